// One step of a plan: collect, norm, update, commit. See step_plan.h.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <atomic>
#include <cmath>
#include <utility>

#include "cpu/parallel.h"
#include "devices.h"
#include "python_values.h"
#include "step_plan.h"
#include "tensor_check.h"

namespace regfused {

namespace {

// Fewer tensors than this are looked at faster by one thread.
constexpr int64_t kTensorsPerThread = 128;

// Not Tensor::grad(), which warns where the tensor is no leaf.
const at::Tensor& grad_of(const at::Tensor& tensor) { return std::as_const(*tensor.unsafeGetTensorImpl()).grad(); }

double count_at(const void* memory, DType dtype) {
  return dtype == DType::float32 ? *static_cast<const float*>(memory) : *static_cast<const double*>(memory);
}
void set_count(void* memory, DType dtype, double count) {
  if (dtype == DType::float32)
    *static_cast<float*>(memory) = static_cast<float>(count);
  else
    *static_cast<double*>(memory) = count;
}

// True for a number of steps.
bool is_count(double count) { return count >= 0 && std::isfinite(count) && count == std::floor(count); }

// Autograd, and anybody who saved the tensor for backward, must see that it changed.
void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// One thread at a time: a second one would find half a step.
class Entered {
 public:
  Entered(bool& busy, const std::string& operation) : busy_(busy) {
    TORCH_CHECK(!busy, operation, ": one step at a time, but another thread is inside a step of this optimizer");
    busy_ = true;
  }
  ~Entered() { busy_ = false; }

 private:
  bool& busy_;
};

// Whether this process has another thread that runs Python code where this one lets it.
bool has_other_python_threads() {
  const PyThreadState* first = PyInterpreterState_ThreadHead(PyThreadState_Get()->interp);
  return PyThreadState_Next(const_cast<PyThreadState*>(first)) != nullptr;
}

// --- Asking for memory ahead ----------------------------------------------------------------------
//
// What is looked at of a tensor lies behind one pointer after another: object, tensor, storage, and for a gradient the
// same again. With thousands of tensors none of it is in the cache, so each is asked for some parameters ahead.

constexpr size_t kCacheLine = 64;

template <int kLines>
void prefetch(const void* memory) {
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(static_cast<const char*>(memory) + line * kCacheLine);
}

// Of an object that is in memory already: its tensor.
void prefetch_tensor(PyObject* object, PyTypeObject* type) {
  if (object && Py_TYPE(object) == type) prefetch<3>(THPVariable_Unpack(object).unsafeGetTensorImpl());
}

// Of a tensor that is in memory already: where its data are said to be.
void prefetch_storage(const at::Tensor& tensor) {
  if (tensor.has_storage()) prefetch<2>(tensor.storage().unsafeGetStorageImpl());
}

// Where a step ends, and where it is left by an exception, it lets go of all that it holds.
class Released {
 public:
  explicit Released(StepPlan& plan) : plan_(&plan) {}
  ~Released() {
    if (plan_) plan_->release();
  }
  void goes_on() { plan_ = nullptr; }

 private:
  StepPlan* plan_;
};

}  // namespace

const at::Tensor& StepPlan::tensor_of(size_t p) const { return THPVariable_Unpack(known_[p].param); }

bool StepPlan::step(py::list param_groups, py::dict state, py::handle grad_scale, py::handle found_inf) {
  Entered entered(busy_, operation_);
  if (!number_on_device(found_inf.ptr()).defined() && !found_inf.is_none() && number(found_inf.ptr()) != 0) {
    ++skipped_;
    outcome_ = "overflow";
    return true;
  }
  c10::AutoGradMode no_grad(false);
  is_open_ = false;
  Released released(*this);
  param_groups_ = std::move(param_groups);
  state_ = std::move(state);
  if (!is_known() || !read_options()) build();
  scalars_.write_unscaled_grad = !grad_scale.is_none();
  driver_.grad_scale = number_on_device(grad_scale.ptr());
  driver_.found_inf = number_on_device(found_inf.ptr());
  scalars_.grad_scale = grad_scale.is_none() || driver_.grad_scale.defined() ? 1 : number(grad_scale.ptr());
  if (!collect()) {
    build();
    TORCH_CHECK(collect(), operation_, ": a parameter was exchanged while it was collected");
  }
  // Making buffers may start the garbage collector, and with it anything; so may what is left to Python.
  if (!pending_.empty() || !leftover.empty() || is_shared || has_other_python_threads()) hold_all();
  driver_.find_live();
  const char* why_host = why_host_judges();
  TORCH_CHECK(!why_host || !driver_.is_capturing(), operation_, ": a step in a CUDA graph must not need the host, but ",
              why_host);
  driver_.begin();
  if (!why_host) {
    let_devices_judge();
    return true;
  }
  if (!let_host_judge(grad_scale, found_inf)) return true;
  if (!leftover.empty() || is_shared) {
    released.goes_on();
    is_open_ = true;
    return false;
  }
  if (judge(needs_norm() ? norm_pass() : NAN)) update_pass();
  return true;
}

// Why the devices cannot take this step by themselves, or null.
const char* StepPlan::why_host_judges() const {
  if (!driver_.can_leave_host()) return "a tensor is not on a CUDA device, or none has a gradient";
  if (is_shared) return "other ranks have a part in its norm";
  if (!leftover.empty()) return "the reference has to step a tensor that the kernels do not take";
  if (groups_.front().nonfinite == StepGroup::Nonfinite::error) return "nonfinite='error' may raise";
  const bool may_skip = driver_.found_inf.defined() || groups_.front().nonfinite == StepGroup::Nonfinite::skip;
  if (!pending_.empty() && (may_skip || driver_.is_capturing()))
    return "a tensor of the state has to be made (take a step before the capture)";
  return nullptr;
}

// What the host has to know where it judges. False: the step is skipped.
bool StepPlan::let_host_judge(py::handle grad_scale, py::handle found_inf) {
  if (driver_.found_inf.defined() && number(found_inf.ptr()) != 0) {
    ++skipped_;
    outcome_ = "overflow";
    return false;
  }
  if (driver_.grad_scale.defined()) scalars_.grad_scale = number(grad_scale.ptr());
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (!groups_[g].device_lr.defined()) continue;
    if (!groups_[g].read_lr()) complain();
    driver_.groups[g].lr = groups_[g].hyper.lr;
  }
  driver_.grad_scale = driver_.found_inf = at::Tensor();
  for (at::Tensor& lr : driver_.lr) lr = at::Tensor();
  return true;
}

// The whole step on the devices: nothing comes back.
void StepPlan::let_devices_judge() {
  const StepGroup& first = groups_.front();
  scalars_.clips = first.clips;
  scalars_.max_norm = first.max_norm;
  scalars_.skip_nonfinite = first.nonfinite == StepGroup::Nonfinite::skip;
  driver_.measure_without_host(scalars_, needs_norm());
  commit();
  run([&] { driver_.step_without_host(scalars_); });
  devices_judged_ = true;
  finish_update();
}

// The update itself. A CUDA device may refuse a launch: then what was committed is taken back.
template <class Update>
void StepPlan::run(Update update) {
  count_and_bump_versions();  // first: what was collected is still in the caches
  try {
    py::gil_scoped_release others_may_run;
    update();
  } catch (...) {
    for (const Param& param : params_) {
      if (param.row < 0 || param.is_async) continue;
      const StepRow& row = driver_.rows[param.row];
      if (row.grad && row.steps) set_count(row.steps, row.steps_dtype, row.t - 1);
    }
    roll_back(pending_.size());
    throw;
  }
}

// Another thread may have taken a whole step since this one was left to Python.
void StepPlan::check_open() const {
  TORCH_CHECK(is_open_, operation_, ": one step at a time, but another thread began a step of this optimizer");
}

double StepPlan::norm() {
  Entered entered(busy_, operation_);
  check_open();
  return norm_pass();
}

void StepPlan::update(const std::vector<at::Tensor>& targets, const std::vector<at::Tensor>& sources) {
  Entered entered(busy_, operation_);
  check_open();
  {
    c10::AutoGradMode no_grad(false);
    update_pass();
  }
  for (size_t i = 0; i < targets.size(); ++i) {
    if (sources[i].layout() == at::kStrided)
      targets[i].copy_(sources[i]);
    else
      targets[i].add_(sources[i]);
  }
}

py::tuple StepPlan::numbers() const {
  std::array<py::object, kRecordSize> all = {py::float_(grad_norm_), py::float_(clip_coef_), py::float_(penalty_),
                                             py::float_(double(skipped_))};
  const std::vector<at::Tensor> of_devices = driver_.numbers();
  if (!of_devices.empty()) {
    const at::Device home = of_devices.front().device();
    for (int i = devices_judged_ ? 0 : kPenalty; i < kRecordSize; ++i) {
      at::Tensor number = of_devices.front().select(0, i);
      if (i >= kPenalty) {
        for (size_t d = 1; d < of_devices.size(); ++d)
          number = number.add(of_devices[d].select(0, i).to(home, /*non_blocking=*/true));
        number = number.add(py::cast<double>(all[i]));
      }
      all[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(number));
    }
  }
  if (!measured_) all[kGradNorm] = py::none();
  return py::make_tuple(all[0], all[1], all[2], all[3]);
}

std::vector<std::pair<int, int>> StepPlan::stepped() const {
  if (!knows_stepped_) return stepped_before_;
  std::vector<std::pair<int, int>> stepped;
  for (const Param& param : params_)
    if (param.stepped) stepped.emplace_back(param.group, param.index);
  return stepped;
}

double StepPlan::norm_pass() {
  py::gil_scoped_release others_may_run;
  return norm_finish(scalars_.norm_type, driver_.norm(scalars_));
}

// --- Collect: everything is checked, nothing is changed ------------------------------------------

std::string StepPlan::name_of(const Param& param) const {
  std::string name = c10::str("parameter ", param.index, " of group ", param.group);
  PyObject* names = PyDict_GetItemString(groups_[param.group].dict.ptr(), "param_names");
  if (names && PyList_Check(names) && param.index < PyList_GET_SIZE(names))
    name += c10::str(" (", py::str(PyList_GET_ITEM(names, param.index)).cast<std::string>(), ")");
  return name;
}

// Whether there is a tensor of the known class at the address of a parameter: another object may have come to it.
bool StepPlan::is_same(size_t p) const {
  return Py_TYPE(known_[p].param) == known_[p].type && is_tensor(known_[p].param);
}

// Cheap: whether the parameter is what it was when it was found eligible.
bool StepPlan::is_unchanged(const Param& param, const at::Tensor& tensor) const {
  const StepRow& row = driver_.rows[param.row];
  if (tensor.data_ptr() != row.param || tensor.numel() != row.numel || tensor.scalar_type() != param.dtype ||
      tensor.key_set() != param.keys)
    return false;
  if (!param.sizes.empty() && tensor.sizes() != at::IntArrayRef(param.sizes)) return false;
  return param.strides.empty() ? tensor.is_contiguous() : tensor.strides() == at::IntArrayRef(param.strides);
}

// Cheap: whether a state tensor is the one that was found to fit, with the same memory.
bool StepPlan::is_unchanged_slot(const StateTensor& known, const at::Tensor& param) const {
  if (!is_tensor(known.object) || Py_TYPE(known.object) != known.type) return false;
  const at::Tensor& slot = THPVariable_Unpack(known.object);
  return slot.key_set() == known.keys && slot.scalar_type() == known.dtype && slot.data_ptr() == known.memory &&
         slot.sizes() == param.sizes() && (known.relay || same_layout(slot, param));
}

bool StepPlan::is_unchanged_count(const StateTensor& known, const at::Tensor& param) const {
  if (!is_tensor(known.object) || Py_TYPE(known.object) != known.type) return false;
  const at::Tensor& count = THPVariable_Unpack(known.object);
  return count.key_set() == known.keys && count.scalar_type() == known.dtype && count.data_ptr() == known.memory &&
         count.numel() == 1 && (known.relay || count.device() == param.device());
}

// Gradients and state of this step. False where a tensor is not the one that was planned for.
bool StepPlan::collect() {
  grads_.assign(params_.size(), at::Tensor());
  relaid_grads_.clear();
  pending_.clear();
  if (!leftover.empty()) leftover = py::list();
  std::atomic<bool> usual = true;
  parallel(static_cast<int64_t>(params_.size()), kTensorsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin - kAhead; p < end && usual; ++p) {
      ask_ahead(p, begin, end);
      if (p >= begin && !collect_usual(p)) usual = false;
    }
  });
  if (usual) return true;
  for (size_t p = 0; p < params_.size(); ++p)
    if (!collect_closely(p)) return false;
  return true;
}

// Asks for what collect_usual() is going to look at a few parameters later, one pointer after the other.
void StepPlan::ask_ahead(int64_t p, int64_t begin, int64_t end) const {
  constexpr int64_t kStage = kAhead / 4;
  const auto at = [&](int64_t stage) { return p + stage * kStage; };
  const auto is_here = [&](int64_t stage) { return at(stage) >= begin && at(stage) < end; };
  const size_t names = names_.size();
  if (is_here(4)) {
    prefetch<1>(known_[at(4)].param);
    for (size_t n = 0; n < names; ++n)
      if (const StateTensor& state = found_[at(4) * names + n]; state.object) prefetch<1>(state.object);
  }
  if (is_here(3)) {
    prefetch_tensor(known_[at(3)].param, known_[at(3)].type);
    for (size_t n = 0; n < names; ++n) {
      const StateTensor& state = found_[at(3) * names + n];
      prefetch_tensor(state.object, state.type);
    }
  }
  if (is_here(2) && is_same(at(2))) {
    const at::Tensor& param = tensor_of(at(2));
    prefetch_storage(param);
    prefetch<1>(param.unsafeGetTensorImpl()->autograd_meta());
    for (size_t n = 0; n < names; ++n) {
      const StateTensor& state = found_[at(2) * names + n];
      if (state.object && Py_TYPE(state.object) == state.type) prefetch_storage(THPVariable_Unpack(state.object));
    }
  }
  if (is_here(1) && is_same(at(1)))
    if (const at::Tensor& grad = grad_of(tensor_of(at(1))); grad.defined()) prefetch<3>(grad.unsafeGetTensorImpl());
}

// The usual case, which runs no Python and needs no memory: a plain gradient in the layout of its parameter, and a
// state that is there. False: to be looked at closely.
bool StepPlan::collect_usual(size_t p) {
  const Param& param = params_[p];
  if (!is_same(p)) return false;
  const at::Tensor& tensor = tensor_of(p);
  const at::Tensor& grad = grad_of(tensor);
  if (param.row < 0) return !grad.defined();
  StepRow& row = driver_.rows[param.row];
  row.grad = nullptr;
  if (!grad.defined()) return true;
  if (!is_unchanged(param, tensor) || grad.key_set() != param.keys || grad.scalar_type() != param.dtype ||
      grad.device() != tensor.device() || !same_layout(grad, tensor))
    return false;
  if (!collect_usual_state(p, tensor)) return false;
  row.grad = address_of_grad(grad.data_ptr());
  grads_[p] = grad;
  return true;
}

bool StepPlan::collect_usual_state(size_t p, const at::Tensor& tensor) {
  const Param& param = params_[p];
  StepRow& row = driver_.rows[param.row];
  row.slot_set = static_cast<uint8_t>(groups_[param.group].slot_set);
  for (int slot = 0; slot < rule_.slot_count; ++slot) {
    row.slots[slot] = nullptr;
    if ((row.slot_set >> slot & 1) == 0) continue;
    const StateTensor& known = found(p, name_of_slot(slot));
    if (!known.object || known.relay || !is_unchanged_slot(known, tensor)) return false;
    row.slots[slot] = known.memory;
  }
  row.t = 2;
  if (!rule_.counts_steps) return true;
  const StateTensor& known = found(p, 0);
  if (!known.object || known.relay || !is_unchanged_count(known, tensor)) return false;
  row.steps = known.memory;
  row.steps_dtype = known.dtype == at::kFloat ? DType::float32 : DType::float64;
  row.t = 0;
  if (param.is_async) return true;
  const double before = count_at(row.steps, row.steps_dtype);
  row.t = before + 1;
  return is_count(before);
}

bool StepPlan::collect_closely(size_t p) {
  const Param& param = params_[p];
  if (!is_same(p)) return false;
  const at::Tensor& tensor = tensor_of(p);
  const at::Tensor& grad = grad_of(tensor);
  if (param.row >= 0) driver_.rows[param.row].grad = nullptr;
  if (!grad.defined()) return true;
  if (param.row >= 0 && !is_unchanged(param, tensor)) return false;
  const std::string why = why_left(p, tensor, grad);
  if (!why.empty()) {
    // The words in front are torch's.
    TORCH_CHECK(!groups_[param.group].demanded, operation_, ": `fused=True` requires all the params to be ",
                "floating point Tensors for its kernels: fused=True demands dense, strided float32, float64, bfloat16 ",
                "or float16 tensors ", where_kernels_run(), " that share no memory, but ", name_of(param), " ", why);
    leftover.append(py::make_tuple(param.group, param.index, py::handle(known_[p].param)));
    return true;
  }
  collect_gradient(p, tensor, grad);
  return collect_state(p, tensor);
}

// Why the reference has to step this tensor, or an empty string. Raises for gradients that fit nowhere.
std::string StepPlan::why_left(size_t p, const at::Tensor& tensor, const at::Tensor& grad) const {
  const Param& param = params_[p];
  if (param.row < 0) {
    std::string why = why_not_fused(tensor);
    if (!why.empty()) return why;
    return is_plain(known_[p].param) ? "is not for the kernels" : "is a tensor subclass";
  }
  if (grad.key_set() == param.keys && grad.scalar_type() == param.dtype && grad.device() == tensor.device() &&
      grad.sizes() == tensor.sizes())
    return "";
  TORCH_CHECK(grad.device() == tensor.device(), operation_, ": a gradient must be on the device of its parameter, but ",
              name_of(param), " is on ", tensor.device(), " and its gradient on ", grad.device());
  TORCH_CHECK(grad.sizes() == tensor.sizes(), operation_, ": a gradient must have the shape of its parameter, but ",
              name_of(param), " has ", tensor.sizes(), " and its gradient ", grad.sizes());
  if (grad.layout() != at::kStrided) return c10::str("has a gradient of layout ", grad.layout());
  if (grad.unsafeGetTensorImpl()->is_python_dispatch()) return "has a gradient that is a tensor subclass";
  if (grad.scalar_type() != param.dtype) return c10::str("has a gradient of dtype ", grad.scalar_type());
  return "";
}

// A gradient that pairs other elements than its parameter is brought into the parameter's layout.
void StepPlan::collect_gradient(size_t p, const at::Tensor& tensor, const at::Tensor& grad) {
  grads_[p] = grad;
  if (!same_layout(grad, tensor) || grad.is_neg()) {
    if (scalars_.write_unscaled_grad) {
      const bool writable = at::has_internal_overlap(grad) != at::MemOverlap::Yes &&
                            (!grad.is_inference() || c10::InferenceMode::is_enabled());
      TORCH_CHECK(writable, operation_, ": with grad_scale a step writes the unscaled gradients, but that of ",
                  name_of(params_[p]),
                  grad.is_inference() ? " is an inference tensor" : " has elements that share memory");
    }
    grads_[p] = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
    grads_[p].copy_(grad);
    relaid_grads_.emplace_back(grad, grads_[p]);
  }
  driver_.rows[params_[p].row].grad = address_of_grad(grads_[p].data_ptr());
}

// The state of one parameter; what is missing is allocated, not yet committed. False where a tensor is not the one that
// was planned for.
bool StepPlan::collect_state(size_t p, const at::Tensor& tensor) {
  const Param& param = params_[p];
  StepRow& row = driver_.rows[param.row];
  row.slot_set = static_cast<uint8_t>(groups_[param.group].slot_set);
  for (int slot = 0; slot < rule_.slot_count; ++slot) {
    const StateTensor& known = found(p, name_of_slot(slot));
    row.slots[slot] = nullptr;
    if ((row.slot_set >> slot & 1) != 0 && known.object && !is_unchanged_slot(known, tensor)) return false;
  }
  row.t = 2;
  if (rule_.counts_steps) {
    if (found(p, 0).object && !is_unchanged_count(found(p, 0), tensor)) return false;
    collect_count(p, tensor);
  }
  for (int slot = 0; slot < rule_.slot_count; ++slot) {
    if ((row.slot_set >> slot & 1) == 0) continue;
    if (!rule_.counts_steps && !found(p, name_of_slot(slot)).object) row.t = 1;
    row.slots[slot] = collect_slot(p, slot, tensor);
  }
  return true;
}

void* StepPlan::collect_slot(size_t p, int slot, const at::Tensor& tensor) {
  const StateTensor& known = found(p, name_of_slot(slot));
  if (known.object && !known.relay) return known.memory;
  at::Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options());
  if (known.object)
    made.copy_(THPVariable_Unpack(known.object));
  else
    made.zero_();
  pending_.push_back({p, name_of_slot(slot), made});
  return made.data_ptr();
}

void StepPlan::collect_count(size_t p, const at::Tensor& tensor) {
  const Param& param = params_[p];
  StepRow& row = driver_.rows[param.row];
  const StateTensor& known = found(p, 0);
  row.steps = known.memory;
  at::ScalarType dtype = known.dtype;
  if (!known.object || known.relay) {
    // As torch makes it.
    const bool is_double =
        at::get_default_dtype() == caffe2::TypeMeta::Make<double>() && !groups_[param.group].demanded;
    dtype = is_double ? at::kDouble : at::kFloat;
    at::Tensor made = at::zeros({}, tensor.options().dtype(dtype));
    if (known.object) made.copy_(THPVariable_Unpack(known.object).reshape({}));
    row.steps = made.data_ptr();
    pending_.push_back({p, 0, std::move(made)});
  }
  row.steps_dtype = dtype == at::kFloat ? DType::float32 : DType::float64;
  row.t = 0;
  if (param.is_async) return;
  const double before = count_at(row.steps, row.steps_dtype);
  if (!is_count(before)) complain();
  row.t = before + 1;
}

// --- Update ------------------------------------------------------------------------------------------

void StepPlan::update_pass() {
  commit();
  run([&] { driver_.step(scalars_); });
  devices_judged_ = false;
  grad_norm_ = judged_norm_;
  clip_coef_ = scalars_.clip_coef;
  finish_update();
}

void StepPlan::finish_update() {
  penalty_ = driver_.penalty();
  outcome_ = "stepped";
  measured_ = needs_norm();
  if (scalars_.write_unscaled_grad)
    for (const auto& [grad, copy] : relaid_grads_) grad.copy_(copy);
}

bool StepPlan::judge(double norm) {
  judged_norm_ = norm;
  scalars_.clip_coef = 1;
  if (!needs_norm()) return true;
  const StepGroup& group = groups_.front();
  if (!std::isfinite(norm) && group.nonfinite == StepGroup::Nonfinite::error) raise_nonfinite(norm);
  if (!std::isfinite(norm) && group.nonfinite == StepGroup::Nonfinite::skip) {
    devices_judged_ = false;
    measured_ = true;
    grad_norm_ = norm;
    clip_coef_ = 0;
    outcome_ = "nonfinite";
    ++skipped_;
    return false;
  }
  if (group.clips) scalars_.clip_coef = clip_coefficient(group.max_norm, norm);
  return true;
}

void StepPlan::raise_nonfinite(double norm) const {
  // A device reports a range of rows where small tensors share one partial norm.
  const auto [first, last] = driver_.first_nonfinite();
  std::string where;
  for (const Param& param : params_) {
    if (first >= 0 && param.row == first) where = "; first in " + name_of(param);
    if (first != last && param.row == last) where += " or in a later one up to " + name_of(param);
  }
  TORCH_CHECK(false, operation_, ": nonfinite='error' demands a finite gradient norm, but it is ", norm, where);
}

// A step counts where the host counts, and everybody who looks at versions sees what it writes.
void StepPlan::count_and_bump_versions() {
  knows_stepped_ = true;
  parallel(static_cast<int64_t>(params_.size()), kTensorsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Param& param = params_[p];
      param.stepped = param.row >= 0 && driver_.rows[param.row].grad;
      if (!param.stepped) continue;
      const StepRow& row = driver_.rows[param.row];
      bump_version(tensor_of(p));
      if (row.steps) {
        if (!param.is_async) set_count(row.steps, row.steps_dtype, row.t);
        bump_version(THPVariable_Unpack(found(p, 0).object));
      }
      for (int slot = 0; slot < rule_.slot_count; ++slot)
        if (row.slots[slot]) bump_version(THPVariable_Unpack(found(p, name_of_slot(slot)).object));
      if (scalars_.write_unscaled_grad) bump_version(grads_[p]);
    }
  });
}

// Fresh tensors become state. Hashing a tensor runs Python code, so this can be interrupted: then
// the state is as it was.
void StepPlan::commit() {
  made_ = pending_.size();
  if (pending_.empty()) return;
  size_t done = 0;
  try {
    for (; done < pending_.size(); ++done) commit_state(pending_[done]);
    remember_state();
  } catch (...) {
    roll_back(done);
    throw;
  }
}

void StepPlan::commit_state(Pending& pending) {
  PyObject* const param = known_[pending.param].param;
  PyObject* const name = names_[pending.name];
  auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(pending.tensor));
  if (!object) throw py::error_already_set();
  py::object fresh;
  PyObject* entry = lookup(state_.ptr(), param);
  if (!entry) {
    fresh = py::dict();
    entry = fresh.ptr();
  }
  pending.fresh_entry = static_cast<bool>(fresh);
  pending.previous = py::reinterpret_borrow<py::object>(lookup(entry, name));
  if (PyDict_SetItem(entry, name, object.ptr()) != 0) throw py::error_already_set();
  if (fresh && PyDict_SetItem(state_.ptr(), param, entry) != 0) throw py::error_already_set();
  StateTensor& known = found(pending.param, pending.name);
  known.object = object.ptr();
  known.type = Py_TYPE(object.ptr());
  known.memory = pending.tensor.data_ptr();
  known.keys = pending.tensor.key_set();
  known.dtype = pending.tensor.scalar_type();
  known.relay = false;
  held_.push_back(std::move(object));
}

void StepPlan::roll_back(size_t count) {
  py::error_scope raised;
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = known_[pending_[i].param].param;
    if (pending_[i].fresh_entry) {
      PyDict_DelItem(state_.ptr(), object);
    } else if (PyObject* entry = PyDict_GetItemWithError(state_.ptr(), object)) {
      if (pending_[i].previous)
        PyDict_SetItem(entry, names_[pending_[i].name], pending_[i].previous.ptr());
      else
        PyDict_DelItem(entry, names_[pending_[i].name]);
    }
    PyErr_Clear();
  }
  forget();
}

}  // namespace regfused
