// The schemas of all operators, torch.ops.regfused.*; what they do is in the files named *_ops.cpp.
#include <torch/library.h>

#include "step_ops.h"

TORCH_LIBRARY(regfused, m) {
  for (int rule = 0; rule < regfused::kRules; ++rule)
    for (bool has_groups : {false, true})
      m.def(regfused::step_schema(static_cast<regfused::RuleId>(rule), has_groups).c_str());
  m.def("penalty(Tensor[] params, float l1, float l2) -> Tensor");
  m.def("penalty_backward(Tensor grad, Tensor[] params, float l1, float l2) -> Tensor[]");
  // The mask follows the memory of the input: a compiled graph must not give it another layout.
  m.def("dropout(Tensor input, float p, Tensor seed) -> Tensor", {at::Tag::needs_exact_strides});
  m.def("dropout_(Tensor(a!) input, float p, Tensor seed) -> ()", {at::Tag::needs_exact_strides});
  m.def("constrain_max_norm_(Tensor(a!)[] params, float max_norm, int? dim=None) -> ()");
}
