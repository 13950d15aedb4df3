// What an optimizer keeps between steps; see sgd_plan.h.
#include "sgd_plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <unordered_map>

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "sgd_check.h"

namespace regfused {

namespace {

enum Option {
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kL1,
  kL2,
  kMaxNorm,
  kNormType,
  kNesterov,
  kMaximize,
  kProximal,
  kPenaltyInClip,
  kDecoupledWeightDecay,
  kClassicalMomentum,
  kNonfinite,
  kFused,
  kForeach,
  kDifferentiable,
  kCount
};

// An interned string: dictionaries find it by identity.
PyObject* key(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (!string) throw py::error_already_set();
  return string;
}

const std::array<PyObject*, kCount>& option_keys() {
  static const std::array<PyObject*, kCount> keys = {key("lr"),
                                                     key("momentum"),
                                                     key("dampening"),
                                                     key("weight_decay"),
                                                     key("l1"),
                                                     key("l2"),
                                                     key("max_norm"),
                                                     key("norm_type"),
                                                     key("nesterov"),
                                                     key("maximize"),
                                                     key("proximal"),
                                                     key("penalty_in_clip"),
                                                     key("decoupled_weight_decay"),
                                                     key("classical_momentum"),
                                                     key("nonfinite"),
                                                     key("fused"),
                                                     key("foreach"),
                                                     key("differentiable")};
  return keys;
}

PyObject* momentum_buffer_key() {
  static PyObject* const string = key("momentum_buffer");
  return string;
}
PyObject* params_key() {
  static PyObject* const string = key("params");
  return string;
}

// A borrowed reference, or nullptr.
PyObject* get(PyObject* dict, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(dict, name);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// NaN where it is no number: every check that follows then fails.
double number(PyObject* value) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    return tensor.numel() == 1 && !tensor.is_complex() ? tensor.item().toDouble() : NAN;
  }
  const double result = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return NAN;
  }
  return result;
}

bool is_switch(PyObject* value) { return PyLong_Check(value); }  // True and False are integers
bool truth(PyObject* value) { return value != Py_None && PyObject_IsTrue(value) == 1; }

bool is_text(PyObject* value, const char* text) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

bool is_strength(double x) { return std::isfinite(x) && x >= 0; }

const at::Tensor& tensor_of(const py::object& object) { return THPVariable_Unpack(object.ptr()); }

// Neither torch.Tensor nor one of its plain relatives: its class may mean something by itself.
bool is_plain(PyObject* object) {
  static const auto* const plain = [] {
    auto* types = new std::vector<py::object>;
    types->push_back(py::module_::import("torch").attr("Tensor"));
    types->push_back(py::module_::import("torch.nn").attr("Parameter"));
    types->push_back(py::module_::import("torch.nn").attr("Buffer"));
    return types;
  }();
  for (const py::object& type : *plain)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr()) return true;
  return false;
}

// Whether the kernels can read this momentum buffer; a buffer in other strides is copied first.
bool buffer_fits(PyObject* object, const at::Tensor& param) {
  if (!THPVariable_Check(object) || !is_plain(object)) return false;
  const at::Tensor& buffer = THPVariable_Unpack(object);
  return buffer.layout() == at::kStrided && buffer.device() == param.device() &&
         buffer.scalar_type() == param.scalar_type() && buffer.sizes() == param.sizes();
}

// Fewer tensors than this are looked at faster by one thread.
constexpr int64_t kTensorsPerThread = 128;

// Autograd, and anybody who saved the tensor for backward, must see that it changed.
void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// A step is not entered twice.
class Entered {
 public:
  explicit Entered(bool& busy) : busy_(busy) {
    TORCH_CHECK(!busy, "regfused.SGD.step: one step at a time, but another thread is inside a step of this optimizer");
    busy_ = true;
  }
  ~Entered() { busy_ = false; }

 private:
  bool& busy_;
};

}  // namespace

SgdPlan::SgdPlan(py::function check) : check_(std::move(check)) { static_assert(kCount == kOptions); }

// --- What is known --------------------------------------------------------------------------------

bool SgdPlan::is_known(const py::list& param_groups, const py::dict& state) const {
  if (groups_.empty() || param_groups.ptr() != param_groups_.ptr() || state.ptr() != state_.ptr()) return false;
  if (param_groups.size() != groups_.size()) return false;
  size_t p = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* dict = PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(g));
    if (dict != groups_[g].dict.ptr()) return false;
    PyObject* list = get(dict, params_key());
    if (list != groups_[g].params.ptr() || !PyList_Check(list)) return false;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    for (Py_ssize_t i = 0; i < size; ++i, ++p) {
      if (p == params_.size() || params_[p].group != static_cast<int32_t>(g) ||
          params_[p].object.ptr() != PyList_GET_ITEM(list, i))
        return false;
    }
  }
  if (p != params_.size()) return false;
  // The state, in its own order: no hashing, no lookup.
  if (static_cast<size_t>(PyDict_Size(state.ptr())) != entries_.size()) return false;
  PyObject *state_key, *value;
  Py_ssize_t position = 0;
  for (size_t e = 0; PyDict_Next(state.ptr(), &position, &state_key, &value); ++e) {
    const StateEntry& entry = entries_[e];
    if (state_key != entry.key.ptr() || value != entry.value.ptr()) return false;
    if (PyDict_Check(value) && get(value, momentum_buffer_key()) != entry.buffer.ptr()) return false;
  }
  return true;
}

void SgdPlan::remember_state(const py::dict& state) {
  entries_.clear();
  PyObject *state_key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &state_key, &value)) {
    PyObject* buffer = PyDict_Check(value) ? get(value, momentum_buffer_key()) : nullptr;
    entries_.push_back({py::reinterpret_borrow<py::object>(state_key), py::reinterpret_borrow<py::object>(value),
                        py::reinterpret_borrow<py::object>(buffer)});
  }
}

void SgdPlan::forget() {
  groups_.clear();
  params_.clear();
  entries_.clear();
  driver_.tensors.clear();
  driver_.groups.clear();
  grads_.clear();
  relaid_grads_.clear();
  pending_.clear();
}

void SgdPlan::build(const py::list& param_groups, const py::dict& state) {
  forget();
  // Only what raises nothing: a half-built plan is never left behind as a known one.
  std::vector<Group> groups;
  std::vector<Param> params;
  for (const py::handle dict : param_groups) {
    TORCH_CHECK_TYPE(PyDict_Check(dict.ptr()), "regfused.SGD.step: param_groups must hold dictionaries");
    Group group;
    group.dict = py::reinterpret_borrow<py::object>(dict);
    group.params = py::reinterpret_borrow<py::object>(get(dict.ptr(), params_key()));
    TORCH_CHECK_TYPE(group.params && PyList_Check(group.params.ptr()), "regfused.SGD.step: 'params' of group ",
                     groups.size(), " must be a list");
    const Py_ssize_t size = PyList_GET_SIZE(group.params.ptr());
    for (Py_ssize_t i = 0; i < size; ++i) {
      Param param;
      param.object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(group.params.ptr(), i));
      TORCH_CHECK_TYPE(THPVariable_Check(param.object.ptr()), "regfused.SGD.step: parameter ", i, " of group ",
                       groups.size(), " must be a tensor, but is a ", Py_TYPE(param.object.ptr())->tp_name);
      param.group = static_cast<int32_t>(groups.size());
      param.index = static_cast<int32_t>(i);
      params.push_back(std::move(param));
    }
    groups.push_back(std::move(group));
  }
  std::vector<SgdHyper> hypers(groups.size());
  groups_ = std::move(groups);
  driver_.groups = std::move(hypers);
  param_groups_ = param_groups;
  state_ = state;
  try {
    read_all_options();
    remember_state(state);
  } catch (...) {
    forget();
    throw;
  }

  std::unordered_map<PyObject*, PyObject*> buffer_of;
  for (const StateEntry& entry : entries_)
    if (entry.buffer && !entry.buffer.is_none()) buffer_of.emplace(entry.key.ptr(), entry.buffer.ptr());

  std::vector<MemoryRange> memory, buffer_memory;
  for (Param& param : params) {
    const at::Tensor& tensor = tensor_of(param.object);
    if (!groups_[param.group].kernels || !is_plain(param.object.ptr()) || !why_not_fused(tensor).empty()) continue;
    const auto found = buffer_of.find(param.object.ptr());
    if (found != buffer_of.end()) {
      if (!buffer_fits(found->second, tensor)) {
        // Python raises, or knows the buffer as one of the reference's, such as a sparse one.
        try {
          check_(param_groups_, state_);
        } catch (...) {
          forget();
          throw;
        }
        continue;
      }
      const at::Tensor& buffer = THPVariable_Unpack(found->second);
      param.buffer = py::reinterpret_borrow<py::object>(found->second);
      param.relay_buffer = !same_layout(buffer, tensor) || buffer.is_neg();
      param.buffer_memory = buffer.data_ptr();
      if (!param.relay_buffer) buffer_memory.push_back(memory_of(buffer));
    }
    param.row = static_cast<int32_t>(driver_.tensors.size());
    param.keys = tensor.key_set();
    param.dtype = tensor.scalar_type();
    if (!tensor.is_contiguous()) param.strides = tensor.strides().vec();
    SgdTensor row;
    row.param = tensor.data_ptr();
    row.numel = tensor.numel();
    row.group = param.group;
    row.dtype = dtype_of(tensor);
    memory.push_back(memory_of(tensor));
    driver_.tensors.push_back(row);
  }
  // One parameter listed twice, or two that share memory: the order of updates has a meaning then,
  // which parallel chunks do not keep. The reference does.
  const bool params_overlap = any_overlap(memory);
  const bool demanded = std::any_of(groups_.begin(), groups_.end(), [](const Group& g) { return g.demanded; });
  memory.insert(memory.end(), buffer_memory.begin(), buffer_memory.end());
  const bool buffers_overlap = !params_overlap && any_overlap(std::move(memory));
  if (buffers_overlap || (params_overlap && demanded)) forget();
  TORCH_CHECK_VALUE(!buffers_overlap, "regfused.SGD.step: a momentum_buffer must share no memory with a parameter or ",
                    "another momentum_buffer, but one does");
  TORCH_CHECK(!params_overlap || !demanded, "regfused.SGD.step: fused=True demands parameters that share no memory, ",
              "but two of them do");
  if (params_overlap) {
    for (Param& param : params) param.row = -1;
    driver_.tensors.clear();
  }
  params_ = std::move(params);
  driver_.cut(choose_sgd_kernels());
}

// Something is not as it must be; Python's check says what.
void SgdPlan::complain() const {
  check_(param_groups_, state_);
  TORCH_INTERNAL_ASSERT(false,
                        "regfused: a hyperparameter or momentum buffer is refused by the kernels, "
                        "but passes the check in Python");
}

// --- Hyperparameters ------------------------------------------------------------------------------

// Reads one group's options; false where they are the objects of the last step.
bool SgdPlan::read_options(Group& group, SgdHyper& hyper) {
  const auto& keys = option_keys();
  std::array<PyObject*, kCount> values;
  bool changed = group.reread;
  for (int i = 0; i < kCount; ++i) {
    values[i] = get(group.dict.ptr(), keys[i]);
    if (!values[i]) complain();
    changed |= values[i] != group.read[i].ptr();
  }
  if (!changed) return false;

  group.reread = true;  // should anything below raise, the next step reads again
  const auto strength = [&](Option option) {
    const double value = number(values[option]);
    if (!is_strength(value)) complain();
    return value;
  };
  hyper.lr = strength(kLr);
  hyper.momentum = strength(kMomentum);
  hyper.dampening = number(values[kDampening]);
  hyper.weight_decay = strength(kWeightDecay);
  hyper.l1 = strength(kL1);
  hyper.l2 = strength(kL2);
  for (Option option :
       {kNesterov, kMaximize, kProximal, kPenaltyInClip, kDecoupledWeightDecay, kClassicalMomentum, kDifferentiable})
    if (!is_switch(values[option])) complain();
  for (Option option : {kFused, kForeach})
    if (values[option] != Py_None && !is_switch(values[option])) complain();
  hyper.nesterov = truth(values[kNesterov]);
  hyper.maximize = truth(values[kMaximize]);
  hyper.proximal = truth(values[kProximal]);
  hyper.penalty_in_clip = truth(values[kPenaltyInClip]);
  hyper.decoupled_weight_decay = truth(values[kDecoupledWeightDecay]);
  hyper.classical_momentum = truth(values[kClassicalMomentum]);
  group.clips = values[kMaxNorm] != Py_None;
  group.max_norm = group.clips ? number(values[kMaxNorm]) : 0;
  group.norm_type = number(values[kNormType]);
  if (!std::isfinite(hyper.dampening) || std::isnan(group.norm_type) || !(group.max_norm >= 0)) complain();
  if (is_text(values[kNonfinite], "propagate"))
    group.nonfinite = Nonfinite::propagate;
  else if (is_text(values[kNonfinite], "skip"))
    group.nonfinite = Nonfinite::skip;
  else if (is_text(values[kNonfinite], "error"))
    group.nonfinite = Nonfinite::error;
  else
    complain();
  group.demanded = truth(values[kFused]);
  group.kernels =
      (values[kFused] == Py_None || group.demanded) && !truth(values[kForeach]) && !truth(values[kDifferentiable]);

  bool tensor = false;
  for (int i = 0; i < kCount; ++i) {
    group.read[i] = py::reinterpret_borrow<py::object>(values[i]);
    tensor |= THPVariable_Check(values[i]);
  }
  group.reread = tensor;
  return true;
}

// False where a group went over to the reference, or back: the plan must be built again.
bool SgdPlan::read_all_options() {
  std::vector<bool> kernels;
  bool changed = false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    kernels.push_back(groups_[g].kernels);
    changed |= read_options(groups_[g], driver_.groups[g]);
  }
  if (!changed) return true;
  const Group& first = groups_.front();
  const bool fused_norm = first.norm_type == 1 || first.norm_type == 2 || first.norm_type == INFINITY;
  for (Group& group : groups_) {
    if (group.clips != first.clips || group.max_norm != first.max_norm || group.norm_type != first.norm_type ||
        group.nonfinite != first.nonfinite)
      complain();
    TORCH_CHECK(fused_norm || !group.demanded, "regfused.SGD.step: fused=True demands norm_type 1, 2 or inf, but got ",
                group.norm_type);
    group.kernels &= fused_norm;
  }
  scalars_.norm_type = first.norm_type == 1 ? NormType::one : first.norm_type == 2 ? NormType::two : NormType::inf;
  for (size_t g = 0; g < groups_.size(); ++g)
    if (groups_[g].kernels != kernels[g]) return false;
  return true;
}

bool SgdPlan::needs_norm() const {
  return !groups_.empty() && (groups_.front().clips || groups_.front().nonfinite != Nonfinite::propagate);
}

// --- Tensors --------------------------------------------------------------------------------------

bool SgdPlan::is_unchanged(const Param& param, const at::Tensor& tensor) const {
  const SgdTensor& row = driver_.tensors[param.row];
  if (tensor.data_ptr() != row.param || tensor.numel() != row.numel || tensor.scalar_type() != param.dtype ||
      tensor.key_set() != param.keys)
    return false;
  return param.strides.empty() ? tensor.is_contiguous() : tensor.strides() == at::IntArrayRef(param.strides);
}

std::string SgdPlan::name_of(const Param& param) const {
  std::string name = c10::str("parameter ", param.index, " of group ", param.group);
  PyObject* names = PyDict_GetItemString(groups_[param.group].dict.ptr(), "param_names");
  if (names && PyList_Check(names) && param.index < PyList_GET_SIZE(names))
    name += c10::str(" (", py::str(PyList_GET_ITEM(names, param.index)).cast<std::string>(), ")");
  return name;
}

// Cheap: whether the buffer is the one that was found to fit, with the same memory.
bool SgdPlan::is_unchanged_buffer(const Param& param, const at::Tensor& tensor) const {
  const at::Tensor& buffer = tensor_of(param.buffer);
  return buffer.key_set() == param.keys && buffer.scalar_type() == param.dtype &&
         buffer.data_ptr() == param.buffer_memory && buffer.sizes() == tensor.sizes() &&
         same_layout(buffer, tensor) != param.relay_buffer;
}

// Why the reference has to step this tensor, or an empty string. Raises for gradients that fit nowhere.
std::string SgdPlan::why_left(const Param& param, const at::Tensor& tensor, const at::Tensor& grad) const {
  if (param.row < 0) {
    std::string why = why_not_fused(tensor);
    if (!why.empty()) return why;
    return is_plain(param.object.ptr()) ? "is not for the kernels" : "is a tensor subclass";
  }
  if (grad.key_set() == param.keys && grad.scalar_type() == param.dtype && grad.sizes() == tensor.sizes()) return "";
  TORCH_CHECK(grad.device() == tensor.device(),
              "regfused.SGD.step: a gradient must be on the device of its parameter, ", "but ", name_of(param),
              " is on ", tensor.device(), " and its gradient on ", grad.device());
  TORCH_CHECK(grad.sizes() == tensor.sizes(),
              "regfused.SGD.step: a gradient must have the shape of its parameter, but ", name_of(param), " has ",
              tensor.sizes(), " and its gradient ", grad.sizes());
  if (grad.layout() != at::kStrided) return c10::str("has a gradient of layout ", grad.layout());
  if (grad.unsafeGetTensorImpl()->is_python_dispatch()) return "has a gradient that is a tensor subclass";
  if (grad.scalar_type() != param.dtype) return c10::str("has a gradient of dtype ", grad.scalar_type());
  return "";
}

// A gradient that pairs other elements than its parameter is brought into the parameter's layout.
void SgdPlan::collect_gradient(size_t p, const at::Tensor& tensor, const at::Tensor& grad) {
  grads_[p] = grad;
  if (!same_layout(grad, tensor) || grad.is_neg()) {
    grads_[p] = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
    grads_[p].copy_(grad);
    relaid_grads_.emplace_back(grad, grads_[p]);
  }
  driver_.tensors[params_[p].row].grad = grads_[p].data_ptr();
}

// The momentum buffer of one parameter; a missing one is allocated, not yet committed.
void SgdPlan::collect_buffer(size_t p, const at::Tensor& tensor) {
  const Param& param = params_[p];
  SgdTensor& row = driver_.tensors[param.row];
  row.first = !param.buffer;
  if (param.buffer && !param.relay_buffer) {
    row.momentum_buffer = param.buffer_memory;
    return;
  }
  at::Tensor buffer = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
  if (param.buffer)
    buffer.copy_(tensor_of(param.buffer));
  else
    buffer.zero_();
  row.momentum_buffer = buffer.data_ptr();
  pending_.push_back({p, std::move(buffer)});
}

// The usual case, which needs no word to Python and no memory: a plain gradient in the layout of
// its parameter, and a momentum buffer that is there. False: collect_tensors looks closer.
bool SgdPlan::collect_usual(size_t p) {
  const Param& param = params_[p];
  const at::Tensor& tensor = tensor_of(param.object);
  const at::Tensor& grad = std::as_const(*tensor.unsafeGetTensorImpl()).grad();
  if (param.row < 0) return !grad.defined();
  SgdTensor& row = driver_.tensors[param.row];
  row.grad = nullptr;
  if (!grad.defined()) return true;
  if (!is_unchanged(param, tensor) || grad.key_set() != param.keys || grad.scalar_type() != param.dtype ||
      !same_layout(grad, tensor))
    return false;
  row.first = false;
  row.momentum_buffer = nullptr;
  if (driver_.groups[param.group].momentum != 0) {
    if (!param.buffer || param.relay_buffer || !is_unchanged_buffer(param, tensor)) return false;
    row.momentum_buffer = param.buffer_memory;
  }
  row.grad = grad.data_ptr();
  grads_[p] = grad;
  return true;
}

// Gradients and buffers of this step; false where a tensor is not the one that was planned for.
bool SgdPlan::collect_tensors() {
  end_step();
  leftover = py::list();
  grads_.resize(params_.size());
  std::atomic<bool> usual = true;
  parallel(static_cast<int64_t>(params_.size()), kTensorsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end && usual; ++p)
      if (!collect_usual(p)) usual = false;
  });
  if (usual) return true;

  for (size_t p = 0; p < params_.size(); ++p) {
    const Param& param = params_[p];
    const at::Tensor& tensor = tensor_of(param.object);
    const at::Tensor& grad = std::as_const(*tensor.unsafeGetTensorImpl()).grad();
    if (param.row >= 0) driver_.tensors[param.row].grad = nullptr;
    if (!grad.defined()) continue;
    if (param.row >= 0 && !is_unchanged(param, tensor)) return false;
    const std::string why = why_left(param, tensor, grad);
    if (!why.empty()) {
      TORCH_CHECK(!groups_[param.group].demanded, "regfused.SGD.step: fused=True demands dense, strided float32, ",
                  "float64, bfloat16 or float16 tensors on the CPU that share no memory, but ", name_of(param), " ",
                  why);
      leftover.append(py::make_tuple(param.group, param.object));
      continue;
    }
    collect_gradient(p, tensor, grad);
    SgdTensor& row = driver_.tensors[param.row];
    row.first = false;
    row.momentum_buffer = nullptr;
    if (driver_.groups[param.group].momentum != 0) {
      if (param.buffer && !is_unchanged_buffer(param, tensor)) return false;
      collect_buffer(p, tensor);
    }
  }
  return true;
}

// --- The step -------------------------------------------------------------------------------------

bool SgdPlan::step(py::list param_groups, py::dict state, py::handle grad_scale, py::handle found_inf) {
  Entered entered(busy_);
  if (!found_inf.is_none() && number(found_inf.ptr()) != 0) {
    ++skipped;
    return true;
  }
  c10::AutoGradMode no_grad(false);
  if (!is_known(param_groups, state) || !read_all_options()) build(param_groups, state);
  scalars_.write_unscaled_grad = !grad_scale.is_none();
  scalars_.grad_scale = grad_scale.is_none() ? 1 : number(grad_scale.ptr());
  if (!collect_tensors()) {
    build(param_groups, state);
    TORCH_CHECK(collect_tensors(), "regfused.SGD.step: a parameter was exchanged while it was collected");
  }
  if (!leftover.empty()) return false;
  update_pass(needs_norm() ? norm_pass() : 0);
  return true;
}

double SgdPlan::norm() {
  Entered entered(busy_);
  return norm_pass();
}

bool SgdPlan::update(double norm) {
  Entered entered(busy_);
  c10::AutoGradMode no_grad(false);
  return update_pass(norm);
}

void SgdPlan::count(double norm, double more_penalty, int64_t more_zeros, int64_t more_numel) {
  grad_norm = norm;
  penalty += more_penalty;
  zeros += more_zeros;
  numel += more_numel;
}

double SgdPlan::norm_pass() {
  py::gil_scoped_release others_may_run;
  return norm_finish(scalars_.norm_type, driver_.norm(scalars_));
}

bool SgdPlan::update_pass(double norm) {
  scalars_.clip_coef = 1;
  scalars_.measure_norm = !needs_norm();
  if (needs_norm()) {
    const Group& group = groups_.front();
    if (!std::isfinite(norm) && group.nonfinite == Nonfinite::error) raise_nonfinite(norm);
    if (!std::isfinite(norm) && group.nonfinite == Nonfinite::skip) {
      grad_norm = norm;
      clip_coef = 0;
      ++skipped;
      end_step();
      return false;
    }
    if (group.clips) scalars_.clip_coef = clip_coefficient(group.max_norm, norm);
  }
  commit();

  // From here on nothing raises.
  SgdTotals totals;
  {
    py::gil_scoped_release others_may_run;
    totals = driver_.step(scalars_);
  }
  if (scalars_.write_unscaled_grad)
    for (const auto& [grad, copy] : relaid_grads_) grad.copy_(copy);
  parallel(static_cast<int64_t>(params_.size()), kTensorsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Param& param = params_[p];
      if (param.row < 0 || !driver_.tensors[param.row].grad) continue;
      bump_version(tensor_of(param.object));
      if (driver_.tensors[param.row].momentum_buffer) bump_version(tensor_of(param.buffer));
      if (scalars_.write_unscaled_grad) bump_version(grads_[p]);
    }
  });
  grad_norm = needs_norm() ? norm : norm_finish(scalars_.norm_type, totals.norm);
  clip_coef = scalars_.clip_coef;
  penalty = totals.penalty;
  zeros = totals.zeros;
  numel = totals.numel;
  end_step();
  return true;
}

void SgdPlan::raise_nonfinite(double norm) const {
  const int64_t row = driver_.first_nonfinite();
  std::string where;
  for (const Param& param : params_)
    if (row >= 0 && param.row == row) where = "; first in " + name_of(param);
  TORCH_CHECK(false, "regfused.SGD.step: nonfinite='error' demands a finite gradient norm, but it is ", norm, where);
}

void SgdPlan::end_step() {
  grads_.clear();
  relaid_grads_.clear();
  pending_.clear();
}

// Fresh buffers become state. Hashing a tensor runs Python code, so this can be interrupted: then
// the state is as it was.
void SgdPlan::commit() {
  if (pending_.empty()) return;
  size_t done = 0;
  try {
    for (; done < pending_.size(); ++done) {
      Pending& pending = pending_[done];
      Param& param = params_[pending.param];
      PyObject* entry = get(state_.ptr(), param.object.ptr());
      py::object fresh;
      if (!entry) {
        fresh = py::dict();
        entry = fresh.ptr();
      }
      auto buffer = py::reinterpret_steal<py::object>(THPVariable_Wrap(pending.buffer));
      if (!buffer) throw py::error_already_set();
      pending.previous = py::reinterpret_borrow<py::object>(get(entry, momentum_buffer_key()));
      if (PyDict_SetItem(entry, momentum_buffer_key(), buffer.ptr()) != 0) throw py::error_already_set();
      if (fresh) {
        if (PyDict_SetItem(state_.ptr(), param.object.ptr(), entry) != 0) throw py::error_already_set();
        pending.fresh_entry = true;
      }
      param.buffer = std::move(buffer);
      param.buffer_memory = pending.buffer.data_ptr();
      param.relay_buffer = false;
    }
  } catch (...) {
    roll_back(done);
    throw;
  }
  remember_state(py::reinterpret_borrow<py::dict>(state_));
}

void SgdPlan::roll_back(size_t count) {
  py::error_scope raised;
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = params_[pending_[i].param].object.ptr();
    if (pending_[i].fresh_entry) {
      PyDict_DelItem(state_.ptr(), object);
    } else if (PyObject* entry = PyDict_GetItemWithError(state_.ptr(), object)) {
      if (pending_[i].previous)
        PyDict_SetItem(entry, momentum_buffer_key(), pending_[i].previous.ptr());
      else
        PyDict_DelItem(entry, momentum_buffer_key());
    }
    PyErr_Clear();
  }
  forget();
}

// --- Garbage collection ---------------------------------------------------------------------------

// A parameter's hook may hold the optimizer, which holds this plan, which holds the parameter.
int SgdPlan::traverse(visitproc visit, void* arg) {
  const auto see = [&](const py::object& object) { return object ? visit(object.ptr(), arg) : 0; };
  if (int stop = see(check_)) return stop;
  if (int stop = see(param_groups_)) return stop;
  if (int stop = see(state_)) return stop;
  if (int stop = see(leftover)) return stop;
  for (const Group& group : groups_) {
    if (int stop = see(group.dict)) return stop;
    if (int stop = see(group.params)) return stop;
    for (const py::object& value : group.read)
      if (int stop = see(value)) return stop;
  }
  for (const Param& param : params_) {
    if (int stop = see(param.object)) return stop;
    if (int stop = see(param.buffer)) return stop;
  }
  for (const StateEntry& entry : entries_) {
    if (int stop = see(entry.key)) return stop;
    if (int stop = see(entry.value)) return stop;
    if (int stop = see(entry.buffer)) return stop;
  }
  return 0;
}

void SgdPlan::clear() {
  forget();
  check_ = py::function();
  param_groups_ = py::object();
  state_ = py::object();
  leftover = py::list();
}

}  // namespace regfused
