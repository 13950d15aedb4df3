// The schemas of all operators, torch.ops.regfused.*; what they do is in the files named *_ops.cpp.
#include <torch/library.h>

TORCH_LIBRARY(regfused, m) {
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first, *, float lr, "
      "float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, float l1=0, float l2=0, "
      "bool proximal=False, float group_l1=0, int group_dim=0, float? max_norm=None, float norm_type=2, "
      "bool penalty_in_clip=True, str nonfinite='propagate', bool decoupled_weight_decay=False, "
      "bool classical_momentum=False, bool maximize=False) -> ()");
  m.def("penalty(Tensor[] params, float l1, float l2) -> Tensor");
  m.def("penalty_backward(Tensor grad, Tensor[] params, float l1, float l2) -> Tensor[]");
  // The mask follows the memory of the input: a compiled graph must not give it another layout.
  m.def("dropout(Tensor input, float p, Tensor seed) -> Tensor", {at::Tag::needs_exact_strides});
  m.def("dropout_(Tensor(a!) input, float p, Tensor seed) -> ()", {at::Tag::needs_exact_strides});
  m.def("constrain_max_norm_(Tensor(a!)[] params, float max_norm, int? dim=None) -> ()");
}
