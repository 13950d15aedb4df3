// Runs the two passes of a step over the tensors of a CUDA device.
#pragma once

#include <vector>

#include "../step_device.h"
#include "slice_drive.h"
#include "step_launch.h"

namespace regfused {

// Two launches for a step, one where nothing needs a norm; three more with a group lasso. What stays the same from step
// to step is in tables in the memory of the device, uploaded when it changed; the rest are arguments of the kernels.
// Only with more tensors than fit there (some 4000) a launch for each 4000 of them goes ahead.
class StepOnCuda : public StepAsyncDevice {
 public:
  explicit StepOnCuda(c10::Device device);

  void cut(const StepWork& work, int8_t index) override;
  void begin(const StepWork& work) override;
  void measure(const StepWork& work, const StepScalars& scalars) override;
  double measured(const StepScalars& scalars) override;
  std::pair<int64_t, int64_t> first_nonfinite() const override;
  void step(const StepWork& work, const StepScalars& scalars) override;
  double penalty() const override { return 0; }  // the device has it: see numbers()

  bool is_capturing() const override;
  at::Tensor partials() const override { return partials_; }
  void judge_and_step(const StepWork& work, const StepScalars& scalars, const std::vector<at::Tensor>& partials_of_all,
                      bool counts) override;
  at::Tensor numbers() const override;

 private:
  void cut_chunks(const StepWork& work);
  void update_table(const StepWork& work);
  void upload_tables(const StepWork& work);
  void collect_inputs(const StepWork& work);
  DeviceNumber number(const at::Tensor& tensor, double value) const;
  StepJob job(const StepWork& work, const StepScalars& scalars) const;
  void launch(StepPass pass, const StepWork& work, const StepJob& job, const char* operation);
  void shrink(const StepWork& work);
  SliceDeviceMetric* metrics() const;
  void gather(const std::vector<at::Tensor>& partials_of_all);
  at::Tensor allocate(size_t bytes) const;
  void replace(at::Tensor& old, at::Tensor by);
  void follow_stream();
  void send(const at::Tensor& to, const void* from, size_t bytes);
  cudaStream_t stream() const;

  c10::Device device_;
  c10::Device memory_;                         // where its tensors are
  int resident_norm_ = 0, resident_step_ = 0;  // blocks that run at the same time
  size_t room_for_inputs_ = 0;

  // On the host.
  std::vector<int32_t> rows_;  // of StepWork::rows: those on this device
  std::vector<Chunk> chunks_;
  std::vector<StepDeviceRow> table_;  // as uploaded
  std::vector<uint64_t> inputs_;      // groups and gradients of this step
  std::vector<DeviceNumber> lr_;      // of each group
  std::vector<size_t> sliced_;        // of those, which have a group lasso
  std::vector<double> measured_;      // partials, where the host judges
  int32_t span_ = 1, span_count_ = 0;
  bool doubles_ = false;
  bool is_uploaded_ = false;

  // On the device.
  at::Tensor tables_;     // chunks, then rows
  at::Tensor partials_;   // a double for each span
  at::Tensor metrics_;    // a SliceDeviceMetric for each row, where a row has a group lasso
  at::Tensor gathered_;   // partials of all devices, where there are several
  at::Tensor penalties_;  // a double for each span
  at::Tensor record_;
  SlicesOnCuda slices_;
  at::Tensor sent_inputs_;  // inputs_, where they do not fit the arguments
  // Numbers in other types or on another device than the kernels read, for one step.
  mutable std::vector<at::Tensor> converted_;

  // What a CUDA graph that was captured may still read when it is replayed.
  bool was_captured_ = false;
  cudaStream_t last_stream_ = nullptr;
  std::vector<at::Tensor> retired_;
};

}  // namespace regfused
