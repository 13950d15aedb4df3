// Stands in for the CUDA toolkit's header of this name; see cuda_runtime.h.
#include "cuda_runtime.h"
