// The schemas of all operators, torch.ops.regfused.*; what they do is in the files named *_ops.cpp.
#include <torch/library.h>

TORCH_LIBRARY(regfused, m) {
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first, *, float lr, "
      "float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, float l1=0, float l2=0, "
      "bool proximal=False, float group_l1=0, int group_dim=0, float? max_norm=None, float norm_type=2, "
      "bool penalty_in_clip=True, str nonfinite='propagate', bool decoupled_weight_decay=False, "
      "bool classical_momentum=False, bool maximize=False) -> ()");
  m.def("constrain_max_norm_(Tensor(a!)[] params, float max_norm, int? dim=None) -> ()");
}
