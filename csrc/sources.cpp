// In a file of its own, as it is compiled anew whenever any other one changes.
#include "sources.h"

#if __has_include("regfused_sources_digest.h")
#include "regfused_sources_digest.h"  // written by setup.py
#else
#define REGFUSED_SOURCES_DIGEST ""
#endif

namespace regfused {

const char* sources_digest() { return REGFUSED_SOURCES_DIGEST; }

}  // namespace regfused
