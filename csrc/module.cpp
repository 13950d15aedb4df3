// The Python module regfused._C. The one file that pays for torch/extension.h.
#include <torch/extension.h>

#include <torch/version.h>

#include "clip_grad_norm.h"
#include "cpu/isa.h"
#include "devices.h"
#include "dropout_ops.h"
#include "members.h"
#include "penalty_ops.h"
#include "python_values.h"
#include "sources.h"
#include "step_plan.h"
#include "tensor_check.h"
#include "watch.h"

namespace regfused {
namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "g++ " __VERSION__;
#endif
  info["isas"] = usable_isas();
  info["isa"] = choose_kernels()->isa;
  info["cuda"] = cuda_built();
  return info;
}

py::dict options_of(const OptionInfo* options, int count) {
  py::dict kinds;
  for (int i = 0; i < count; ++i) {
    const OptionKind kind = options[i].kind;
    kinds[options[i].name] = kind == OptionKind::strength    ? "strength"
                             : kind == OptionKind::finite    ? "finite"
                             : kind == OptionKind::fractions ? "fractions"
                                                             : "flag";
  }
  return kinds;
}

// The tables of the engine ("") and of each rule: names and kinds of options, names of slots.
py::dict rules() {
  py::dict all;
  py::dict engine;
  engine["options"] = options_of(kStepOptions, int(std::size(kStepOptions)));
  all[""] = engine;
  for (int r = 0; r < kRules; ++r) {
    const RuleInfo& info = info_of(static_cast<RuleId>(r));
    py::dict rule;
    rule["options"] = options_of(info.options, info.option_count);
    rule["slots"] = std::vector<std::string>(info.slots, info.slots + info.slot_count);
    rule["counts_steps"] = info.counts_steps;
    all[info.name] = rule;
  }
  return all;
}

// Which tensors the kernels take, one by one; none where two share memory. None within torch.func, whose wrappers look
// plain and have no memory, and within torch.jit.trace, which does not see operators from outside.
std::vector<bool> takes(const std::vector<at::Tensor>& tensors) {
  if (in_functional_transform() || in_jit_trace()) return std::vector<bool>(tensors.size(), false);
  std::vector<bool> taken;
  std::vector<MemoryRange> memory;
  for (const at::Tensor& tensor : tensors) {
    taken.push_back(is_plain(py::cast(tensor).ptr()) && why_not_fused(tensor).empty());
    if (taken.back()) memory.push_back(memory_of(tensor));
  }
  if (any_overlap(std::move(memory))) taken.assign(tensors.size(), false);
  return taken;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of regfused.";
  m.attr("TORCH_VERSION") = TORCH_VERSION;
  m.attr("SOURCES") = sources_digest();
  m.attr("CUDA") = cuda_built();
  m.def("build_info", &build_info);
  m.def("clip_grad_norm", &clip_grad_norm);
  m.def("penalty", &penalty);
  m.def("dropout", &dropout_eagerly, py::arg("input"), py::arg("p"), py::arg("inplace"),
        py::call_guard<py::gil_scoped_release>());
  m.def("rules", &rules);
  m.def("takes", &takes);
  m.def("in_functional_transform", &in_functional_transform);
  m.def("is_watched", &is_watched);
  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init<const std::string&, const std::string&, py::function>(), py::arg("rule"), py::arg("optimizer"),
           py::arg("check"))
      .def("step", &StepPlan::step)
      .def("norm", &StepPlan::norm)
      .def("judge", &StepPlan::judge)
      .def("update", &StepPlan::update)
      .def("release", &StepPlan::release)
      .def_property_readonly("tensors", &StepPlan::tensors)
      .def_property_readonly("needs_norm", &StepPlan::needs_norm)
      .def_property_readonly("outcome", &StepPlan::outcome)
      .def_readwrite("is_shared", &StepPlan::is_shared)
      .def_readonly("leftover", &StepPlan::leftover)
      .def("numbers", &StepPlan::numbers)
      .def("stepped", &StepPlan::stepped)
      .def_property_readonly("clip_coef", &StepPlan::clip_coef)
      .def_property_readonly("made", &StepPlan::made);
  py::class_<Members>(m, "Members")
      .def(py::init<py::function, py::function>(), py::arg("is_spread_as"), py::arg("part_of"))
      .def("add", &Members::add)
      .def("bump_versions", &Members::bump_versions)
      .def("know_state", &Members::know_state)
      .def("open", &Members::open)
      .def("release", &Members::release)
      .def("has_grad", &Members::has_grad)
      .def_property_readonly("changed", &Members::changed)
      .def("settle", &Members::settle);
}

}  // namespace regfused
