// Runs passes over lists of tensors on a CUDA device.
#include "foreach_drive.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "grid.h"
#include "stream.h"

namespace regfused {

namespace {

// The tensors of a list that go into one launch.
struct Packet {
  std::vector<ForeachRow> rows;
  int64_t chunks = 0;
};

struct Packets {
  int64_t chunk_size = 1;
  int64_t span = 1;
  std::vector<Packet> packets;

  explicit Packets(const ForeachList& list) {
    int64_t numel = 0, chunks = 0;
    for (const ForeachTensor& tensor : list) numel += tensor.numel;
    chunk_size = chunk_for(numel);
    const auto room = static_cast<size_t>(foreach_room());
    for (const ForeachTensor& tensor : list) {
      if (tensor.numel == 0) continue;
      if (packets.empty() || packets.back().rows.size() == room) packets.emplace_back();
      Packet& packet = packets.back();
      packet.rows.push_back({tensor.data, tensor.out, tensor.numel, static_cast<int32_t>(packet.chunks), tensor.dtype});
      const int64_t here = (tensor.numel + chunk_size - 1) / chunk_size;
      packet.chunks += here;
      chunks += here;
      TORCH_CHECK(packet.chunks < int64_t(1) << 30, "regfused: too many elements on one device");
    }
    span = span_for(chunks);
  }

  int64_t spans_of(const Packet& packet) const { return (packet.chunks + span - 1) / span; }

  ForeachJob of(const Packet& packet, ForeachJob job) const {
    job.chunk_size = chunk_size;
    job.rows = static_cast<int32_t>(packet.rows.size());
    job.chunk_count = static_cast<int32_t>(packet.chunks);
    job.span = static_cast<int32_t>(span);
    job.span_count = static_cast<int32_t>(spans_of(packet));
    return job;
  }
};

}  // namespace

ForeachOnCuda::ForeachOnCuda(c10::Device device) : device_(device), memory_(memory_of(device)) {}

at::Tensor ForeachOnCuda::doubles(at::IntArrayRef shape) const {
  return at::empty(shape, at::TensorOptions().device(memory_).dtype(at::kDouble));
}

// `work`: what can be dealt out to blocks.
void ForeachOnCuda::launch(ForeachPass pass, const ForeachJob& job, const ForeachRow* rows, int64_t work) const {
  int resident = 0;
  check_cuda(foreach_resident_blocks(pass, device_.index(), resident), "tell how many blocks it runs at once");
  check_cuda(launch_foreach(pass, job, rows, blocks_for(work, resident), current_stream(device_)),
             "launch a pass over a list of tensors");
}

at::Tensor ForeachOnCuda::reduce(ForeachPass pass, const ForeachList& list, ForeachJob job) const {
  const c10::DeviceGuard guard(memory_);
  const Packets all(list);
  int64_t spans = 0;
  for (const Packet& packet : all.packets) spans += all.spans_of(packet);
  at::Tensor partials = doubles({spans});
  job.partials = static_cast<double*>(partials.data_ptr());
  for (const Packet& packet : all.packets) {
    launch(pass, all.of(packet, job), packet.rows.data(), all.spans_of(packet));
    job.partials += all.spans_of(packet);
  }
  return partials;
}

at::Tensor ForeachOnCuda::norms(const ForeachList& list, NormType type) const {
  ForeachJob job;
  job.norm_type = type;
  return reduce(ForeachPass::norm, list, job);
}

at::Tensor ForeachOnCuda::penalties(const ForeachList& list, double l1, double l2) const {
  ForeachJob job;
  job.l1 = l1;
  job.l2 = l2;
  return reduce(ForeachPass::penalty, list, job);
}

at::Tensor ForeachOnCuda::clip(const ForeachList& list, const at::Tensor& norms, NormType type, double max_norm) const {
  const c10::DeviceGuard guard(memory_);
  Packets all(list);
  if (all.packets.empty()) all.packets.emplace_back();  // for the norm alone
  at::Tensor norm = doubles({});
  ForeachJob job;
  job.gathered = static_cast<const double*>(norms.data_ptr());
  job.gathered_count = static_cast<int32_t>(norms.numel());
  job.norm_type = type;
  job.max_norm = max_norm;
  job.norm = static_cast<double*>(norm.data_ptr());
  for (const Packet& packet : all.packets) {
    launch(ForeachPass::clip, all.of(packet, job), packet.rows.data(), packet.chunks);
    job.norm = nullptr;
  }
  return norm;
}

void ForeachOnCuda::penalty_gradients(const ForeachList& list, double l1, double l2, const at::Tensor& gain) const {
  const c10::DeviceGuard guard(memory_);
  const at::Tensor here = gain.is_cpu() && !memory_.is_cpu() ? gain : gain.to(memory_);
  ForeachJob job;
  job.l1 = l1;
  job.l2 = l2;
  job.gain = here.is_cpu() && !memory_.is_cpu() ? DeviceNumber{here.item().toDouble(), nullptr, false}
                                                : DeviceNumber{0, here.data_ptr(), here.scalar_type() == at::kDouble};
  const Packets all(list);
  for (const Packet& packet : all.packets)
    launch(ForeachPass::penalty_gradient, all.of(packet, job), packet.rows.data(), packet.chunks);
}

}  // namespace regfused
