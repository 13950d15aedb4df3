// Runs the two passes of a step over the tensors of a CUDA device.
#include "step_drive.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "../strength.h"
#include "grid.h"
#include "stream.h"

namespace regfused {

namespace {

static_assert(sizeof(Chunk) % 8 == 0 && sizeof(StepDeviceRow) % 8 == 0 && sizeof(StepDeviceGroup) % 8 == 0 &&
              sizeof(StepGrad) == 8 && sizeof(SliceDeviceMetric) % 8 == 0 && sizeof(unsigned) <= sizeof(double));

}  // namespace

StepOnCuda::StepOnCuda(c10::Device device)
    : device_(device), memory_(memory_of(device)), room_for_inputs_(step_room_for_inputs()), slices_(device) {
  // As long as no step was taken: no norm, no clip, nothing skipped.
  record_ = at::zeros({kDeviceRecordSize}, at::TensorOptions().device(memory_).dtype(at::kDouble));
  record_.select(0, kGradNorm).fill_(NAN);
  record_.select(0, kClipCoef).fill_(1);
}

cudaStream_t StepOnCuda::stream() const { return current_stream(device_); }

bool StepOnCuda::is_capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream(), &status), "tell whether a stream is capturing");
  return status != cudaStreamCaptureStatusNone;
}

at::Tensor StepOnCuda::allocate(size_t bytes) const {
  return at::empty({static_cast<int64_t>((bytes + 7) / 8)}, at::TensorOptions().device(memory_).dtype(at::kDouble));
}

// A graph may read the old memory at its next replay.
void StepOnCuda::replace(at::Tensor& old, at::Tensor by) {
  if (old.defined() && was_captured_) retired_.push_back(old);
  old = std::move(by);
}

// torch's allocator must know of each stream that uses what was allocated on another one.
void StepOnCuda::follow_stream() {
  const cudaStream_t now = stream();
  if (now == last_stream_) return;
  last_stream_ = now;
  for (const at::Tensor* tensor : std::initializer_list<const at::Tensor*>{
           &tables_, &partials_, &gathered_, &penalties_, &record_, &sent_inputs_, &metrics_, &slices_.memory()})
    if (tensor->defined()) in_use_on_current_stream(*tensor);
}

void StepOnCuda::send(const at::Tensor& to, const void* from, size_t bytes) {
  if (bytes > 0) check_cuda(upload(to.data_ptr(), from, bytes, stream()), "upload a table");
}

// --- The tables -----------------------------------------------------------------------------------

void StepOnCuda::cut(const StepWork& work, int8_t index) {
  rows_.clear();
  for (size_t row = 0; row < work.rows.size(); ++row)
    if (work.rows[row].device == index) rows_.push_back(static_cast<int32_t>(row));
  is_uploaded_ = false;
}

void StepOnCuda::cut_chunks(const StepWork& work) {
  int64_t numel = 0;
  for (const int32_t row : rows_) numel += work.rows[row].numel;
  const int64_t chunk = chunk_for(numel);
  chunks_.clear();
  for (size_t r = 0; r < rows_.size(); ++r) {
    const int64_t size = work.rows[rows_[r]].numel;
    for (int64_t begin = 0; begin < size; begin += chunk)
      chunks_.push_back({static_cast<int32_t>(r), static_cast<int32_t>(std::min(chunk, size - begin)), begin});
  }
  TORCH_CHECK(chunks_.size() < size_t(1) << 30, "regfused: too many elements on one device");
  span_ = static_cast<int32_t>(span_for(static_cast<int64_t>(chunks_.size())));
  // Of nothing at all there is one span, whose norm is 0.
  span_count_ = std::max(static_cast<int32_t>((static_cast<int64_t>(chunks_.size()) + span_ - 1) / span_), 1);
}

void StepOnCuda::begin(const StepWork& work) {
  const c10::DeviceGuard guard(memory_);
  converted_.clear();
  follow_stream();
  update_table(work);
  if (!is_uploaded_) {
    TORCH_CHECK(!is_capturing(),
                "regfused: in a CUDA graph a step must find everything as the step before left it, but "
                "parameters, their state or groups are new (take a step before the capture)");
    cut_chunks(work);
    upload_tables(work);
  }
  was_captured_ |= is_capturing();
  collect_inputs(work);
}

// Notes where the tables on the device are out of date.
void StepOnCuda::update_table(const StepWork& work) {
  is_uploaded_ &= table_.size() == rows_.size();
  table_.resize(rows_.size());
  for (size_t r = 0; r < rows_.size(); ++r) {
    const StepRow& row = work.rows[rows_[r]];
    StepDeviceRow now = table_[r];
    now.param = row.param;
    now.group = row.group;
    now.dtype = row.dtype;
    // Where a parameter has no gradient its state does not matter.
    if (row.grad || !is_uploaded_) {
      std::copy_n(row.slots, kMostSlots, now.slots);
      now.slot_set = row.slot_set;
      now.steps = row.steps;
      now.steps_dtype = row.steps_dtype;
    }
    TORCH_INTERNAL_ASSERT(!row.grad || row.steps || !info_of(work.rule).counts_steps);
    is_uploaded_ &= table_[r] == now;
    table_[r] = now;
  }
}

void StepOnCuda::upload_tables(const StepWork& work) {
  doubles_ = false;
  for (const StepDeviceRow& row : table_) doubles_ |= row.dtype == DType::float64;
  const char* operation = "tell how many blocks it runs at once";
  check_cuda(step_resident_blocks({StepPass::norm, work.rule, doubles_}, device_.index(), resident_norm_), operation);
  check_cuda(step_resident_blocks({StepPass::step, work.rule, doubles_}, device_.index(), resident_step_), operation);
  const size_t chunk_bytes = chunks_.size() * sizeof(Chunk);
  const size_t table_bytes = table_.size() * sizeof(StepDeviceRow);
  std::vector<unsigned char> bytes(chunk_bytes + table_bytes);
  std::copy_n(reinterpret_cast<const unsigned char*>(chunks_.data()), chunk_bytes, bytes.data());
  std::copy_n(reinterpret_cast<const unsigned char*>(table_.data()), table_bytes, bytes.data() + chunk_bytes);
  replace(tables_, allocate(bytes.size()));
  replace(partials_, allocate(sizeof(double) * span_count_));
  at::Tensor penalties = at::zeros({span_count_}, partials_.options());
  if (penalties_.defined()) penalties.select(0, 0).copy_(penalties_.sum());  // that of the last step stays
  replace(penalties_, std::move(penalties));
  sliced_.clear();
  std::vector<SliceTensor> slices;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const StepRow& row = work.rows[rows_[r]];
    if (work.groups[row.group].group_l1 == 0 || row.numel == 0) continue;
    sliced_.push_back(r);
    slices.push_back(slices_of(row, work.groups[row.group], {}));
  }
  if (slices_.memory().defined() && was_captured_) retired_.push_back(slices_.memory());
  const bool metrics = info_of(work.rule).counts_steps;  // count_steps leaves them
  slices_.plan(slices, metrics);
  if (metrics && !sliced_.empty()) replace(metrics_, allocate(rows_.size() * sizeof(SliceDeviceMetric)));
  send(tables_, bytes.data(), bytes.size());
  is_uploaded_ = true;
}

// --- One step -------------------------------------------------------------------------------------

void StepOnCuda::collect_inputs(const StepWork& work) {
  constexpr size_t kGroupWords = sizeof(StepDeviceGroup) / 8;
  inputs_.assign(work.groups.size() * kGroupWords + rows_.size(), 0);
  lr_.clear();
  for (size_t g = 0; g < work.groups.size(); ++g) {
    StepDeviceGroup group{};
    group.hyper = work.groups[g];
    group.lr = number(work.lr[g], work.groups[g].lr);
    if (work.lr[g].defined()) group.lr.rounding = static_cast<float>(rounding_of(work.lr[g].scalar_type()));
    lr_.push_back(group.lr);
    std::memcpy(inputs_.data() + g * kGroupWords, &group, sizeof group);
  }
  uint64_t* grads = inputs_.data() + work.groups.size() * kGroupWords;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const StepRow& row = work.rows[rows_[r]];
    if (!row.grad) continue;
    const StepGrad grad(row.grad, row.t == 1);
    std::memcpy(grads + r, &grad, sizeof grad);
  }
  const size_t bytes = inputs_.size() * sizeof(uint64_t);
  if (bytes <= room_for_inputs_) return;
  if (!sent_inputs_.defined() || sent_inputs_.nbytes() < bytes) {
    TORCH_CHECK(!is_capturing(), "regfused: take a step before the capture in a CUDA graph");
    replace(sent_inputs_, allocate(bytes));
  }
  send(sent_inputs_, inputs_.data(), bytes);
}

// A number on the device where there is one, in a type that the kernels read.
DeviceNumber StepOnCuda::number(const at::Tensor& tensor, double value) const {
  if (!tensor.defined()) return {value, nullptr, false};
  at::Tensor here = tensor;
  const at::ScalarType read_as = here.scalar_type() == at::kFloat ? at::kFloat : at::kDouble;
  if (here.scalar_type() != read_as || here.device() != memory_) {
    here = here.to(memory_, read_as, /*non_blocking=*/true);
    converted_.push_back(here);
  }
  return {0, here.data_ptr(), here.scalar_type() == at::kDouble};
}

StepJob StepOnCuda::job(const StepWork& work, const StepScalars& scalars) const {
  StepJob job;
  job.chunks = static_cast<const Chunk*>(tables_.data_ptr());
  job.rows = reinterpret_cast<const StepDeviceRow*>(job.chunks + chunks_.size());
  job.row_count = static_cast<int32_t>(rows_.size());
  job.chunk_count = static_cast<int32_t>(chunks_.size());
  job.span = span_;
  job.span_count = span_count_;
  job.group_count = static_cast<int32_t>(work.groups.size());
  job.partials = static_cast<double*>(partials_.data_ptr());
  job.penalties = static_cast<double*>(penalties_.data_ptr());
  job.record = static_cast<double*>(record_.data_ptr());
  if (!sliced_.empty()) job.metrics = metrics();
  if (inputs_.size() * sizeof(uint64_t) > room_for_inputs_)
    job.inputs = static_cast<const unsigned char*>(sent_inputs_.data_ptr());
  job.grad_scale = number(work.grad_scale, scalars.grad_scale);
  job.found_inf = number(work.found_inf, 0);
  job.clip_coef = scalars.clip_coef;
  job.max_norm = scalars.max_norm;
  job.norm_type = scalars.norm_type;
  job.clips = scalars.clips;
  job.skip_nonfinite = scalars.skip_nonfinite;
  job.write_unscaled_grad = scalars.write_unscaled_grad;
  return job;
}

void StepOnCuda::launch(StepPass pass, const StepWork& work, const StepJob& job, const char* operation) {
  const int blocks = blocks_for(span_count_, pass == StepPass::norm ? resident_norm_ : resident_step_);
  check_cuda(launch_step({pass, work.rule, doubles_}, job, reinterpret_cast<const unsigned char*>(inputs_.data()),
                         inputs_.size() * sizeof(uint64_t), blocks, stream()),
             operation);
}

void StepOnCuda::measure(const StepWork& work, const StepScalars& scalars) {
  const c10::DeviceGuard guard(memory_);
  launch(StepPass::norm, work, job(work, scalars), "launch the norm kernel");
}

double StepOnCuda::measured(const StepScalars& scalars) {
  const at::Tensor partials = partials_.to(at::kCPU);
  const auto* values = static_cast<const double*>(partials.data_ptr());
  measured_.assign(values, values + span_count_);
  double accumulated = 0;
  for (const double partial : measured_) accumulated = norm_combine(scalars.norm_type, accumulated, partial);
  return accumulated;
}

std::pair<int64_t, int64_t> StepOnCuda::first_nonfinite() const {
  for (size_t s = 0; s < measured_.size(); ++s) {
    if (std::isfinite(measured_[s])) continue;
    const size_t begin = s * span_, end = std::min(begin + span_, chunks_.size());
    return {rows_[chunks_[begin].tensor], rows_[chunks_[end - 1].tensor]};
  }
  return {-1, -1};
}

void StepOnCuda::step(const StepWork& work, const StepScalars& scalars) {
  const c10::DeviceGuard guard(memory_);
  launch(StepPass::step, work, job(work, scalars), "launch the step kernel");
  shrink(work);
}

SliceDeviceMetric* StepOnCuda::metrics() const {
  return metrics_.defined() ? static_cast<SliceDeviceMetric*>(metrics_.data_ptr()) : nullptr;
}

// The group lasso, unless the device has skipped the step.
void StepOnCuda::shrink(const StepWork& work) {
  for (size_t i = 0; i < sliced_.size(); ++i) {
    const StepRow& row = work.rows[rows_[sliced_[i]]];
    const StepHyper& hyper = work.groups[row.group];
    slices_.set(i, row.grad ? row.param : nullptr, hyper.group_bound(), lr_[row.group]);
    const StepLength length = info_of(work.rule).length(hyper, StepTime(), row.slot_set);
    if (length.slot >= 0) slices_.set_metric(i, row.slots[length.slot], metrics() + sliced_[i]);
  }
  slices_.shrink(static_cast<const double*>(record_.data_ptr()) + kStepSkipped);
}

void StepOnCuda::judge_and_step(const StepWork& work, const StepScalars& scalars,
                                const std::vector<at::Tensor>& partials_of_all, bool counts) {
  const c10::DeviceGuard guard(memory_);
  StepJob judging = job(work, scalars);
  judging.judges = true;
  judging.counts_skips = counts;
  if (partials_of_all.size() == 1) {
    judging.gathered = judging.partials;
    judging.gathered_count = span_count_;
  } else if (!partials_of_all.empty()) {
    gather(partials_of_all);
    judging.gathered = static_cast<const double*>(gathered_.data_ptr());
    judging.gathered_count = static_cast<int32_t>(gathered_.numel());
  }
  launch(StepPass::step, work, judging, "launch the step kernel");
  shrink(work);
}

// torch's copies between devices wait for each other on the devices, not on the host.
void StepOnCuda::gather(const std::vector<at::Tensor>& partials_of_all) {
  int64_t total = 0;
  for (const at::Tensor& partials : partials_of_all) total += partials.numel();
  if (!gathered_.defined() || gathered_.numel() != total) replace(gathered_, allocate(total * sizeof(double)));
  int64_t begin = 0;
  for (const at::Tensor& partials : partials_of_all) {
    gathered_.narrow(0, begin, partials.numel()).copy_(partials, /*non_blocking=*/true);
    begin += partials.numel();
  }
}

at::Tensor StepOnCuda::numbers() const {
  const c10::DeviceGuard guard(memory_);
  at::Tensor numbers = record_.narrow(0, 0, kRecordSize).clone();
  numbers.select(0, kPenalty).copy_(penalties_.sum());
  return numbers;
}

}  // namespace regfused
