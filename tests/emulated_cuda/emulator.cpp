// Runs kernels on the host, one block after another, each thread of a block as a fiber.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define START_SWITCH(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define FINISH_SWITCH(fake) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr)
#else
#define START_SWITCH(save, stack, size) (void)(save)
#define FINISH_SWITCH(fake) (void)(fake)
#endif

#if !defined(__x86_64__)
#error "the emulator switches fibers by x86-64 instructions"
#endif

// Puts the registers that a call must keep on this stack, goes over to another one and takes them from there. (Not
// swapcontext: with its two system calls the tests would take ten times as long.)
extern "C" void emulated_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulated_switch, . - emulated_switch
)");

namespace emulated {
namespace {

constexpr size_t kStack = 192 * 1024;  // the largest arguments are 32 KB, copied for each fiber
constexpr unsigned kWarp = 32;

enum class Waits { no, for_block, for_warp, done };

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  Waits waits = Waits::done;
  const char* file = "";
  int line = 0;
  unsigned char lane_value[8] = {};
  unsigned distance = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
void* scheduler = nullptr;  // its stack pointer
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;
unsigned threads_of_block = 0;

std::unique_ptr<unsigned char[]> shared_memory;
size_t shared_bytes = 0;

std::string problem;
std::mt19937 random_order(0);

// What the tests see and set.
long launches = 0;
int failing_launch = -1;
bool capturing = false;
struct Captured {
  unsigned blocks, threads;
  std::function<void()> kernel;
};
std::vector<Captured> captured;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

std::vector<unsigned> order(unsigned n) {
  std::vector<unsigned> indices(n);
  std::iota(indices.begin(), indices.end(), 0u);
  const std::string how = setting("REGFUSED_EMULATED_ORDER", "forward");
  if (how == "reverse") std::reverse(indices.begin(), indices.end());
  if (how == "random") std::shuffle(indices.begin(), indices.end(), random_order);
  return indices;
}

void to_scheduler() {
  Fiber* self = running;
  const bool last_time = self->waits == Waits::done;
  START_SWITCH(last_time ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
  emulated_switch(&self->stack_pointer, scheduler);
  FINISH_SWITCH(self->fake_stack);
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  running->waits = Waits::done;
  to_scheduler();
}

void run(Fiber& fiber) {
  running = &fiber;
  START_SWITCH(&scheduler_fake_stack, fiber.stack.get(), kStack);
  emulated_switch(&scheduler, fiber.stack_pointer);
  FINISH_SWITCH(scheduler_fake_stack);
  running = nullptr;
}

// All lanes of a warp that are not done have come to the same shuffle.
void release_warp(unsigned warp) {
  const unsigned begin = warp * kWarp, end = std::min(begin + kWarp, threads_of_block);
  const Fiber* first = nullptr;
  for (unsigned t = begin; t < end; ++t) {
    const Fiber& lane = *fibers[t];
    if (lane.waits != Waits::for_warp) return;  // a lane that is done never comes: the warp stays, and is reported
    if (!first) first = &lane;
    if (lane.line != first->line || lane.file != first->file) return;
  }
  unsigned char values[kWarp][8];
  for (unsigned t = begin; t < end; ++t) std::memcpy(values[t - begin], fibers[t]->lane_value, 8);
  for (unsigned t = begin; t < end; ++t) {
    const unsigned from = t + fibers[t]->distance;
    if (from < end) std::memcpy(fibers[t]->lane_value, values[from - begin], 8);
    fibers[t]->waits = Waits::no;
  }
}

bool release_block() {
  const Fiber& first = *fibers[0];
  for (unsigned t = 0; t < threads_of_block; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.waits != Waits::for_block || fiber.line != first.line || fiber.file != first.file) return false;
  }
  for (unsigned t = 0; t < threads_of_block; ++t) fibers[t]->waits = Waits::no;
  return true;
}

// Runs those of some threads that wait for nothing. False where there is none.
bool run_some(unsigned begin, unsigned count) {
  bool any = false;
  for (const unsigned i : order(count)) {
    const unsigned t = begin + i;
    if (fibers[t]->waits != Waits::no) continue;
    any = true;
    threadIdx = {t};
    run(*fibers[t]);
    if (fibers[t]->waits == Waits::for_warp) release_warp(t / kWarp);
  }
  return any;
}

// Until nobody can go on: at random all take turns; otherwise one warp goes as far as it gets before the next one, the
// last or the first of them ahead.
bool run_all() {
  if (setting("REGFUSED_EMULATED_ORDER", "forward") == "random") return run_some(0, threads_of_block);
  bool any = false;
  for (const unsigned warp : order(threads_of_block / kWarp))
    while (run_some(warp * kWarp, kWarp)) any = true;
  return any;
}

void run_block(unsigned block, unsigned blocks) {
  shared_memory.reset();
  blockIdx = {block};
  blockDim = {threads_of_block, 1, 1};
  gridDim = {blocks, 1, 1};
  for (unsigned t = 0; t < threads_of_block; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.waits = Waits::no;
    fiber.fake_stack = nullptr;
    // What emulated_switch takes from the stack: six registers, and where to go.
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) / 16 * 16);
    top[-2] = reinterpret_cast<void*>(&start);
    fiber.stack_pointer = top - 8;
  }
  while (true) {
    if (run_all() || release_block()) continue;
    for (unsigned t = 0; t < threads_of_block; ++t) {
      const Fiber& fiber = *fibers[t];
      if (fiber.waits == Waits::done) continue;
      problem = "threads of one block wait at different places, or some are done: thread " + std::to_string(t) +
                " at " + fiber.file + ":" + std::to_string(fiber.line);
    }
    return;
  }
}

int run_grid(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  problem.clear();
  threads_of_block = threads;
  body = &kernel;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (const unsigned block : order(blocks)) {
    run_block(block, blocks);
    if (problem.empty()) continue;
    std::fprintf(stderr, "emulated kernel: %s\n", problem.c_str());
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace

Index threadIdx, blockIdx, blockDim, gridDim;

void* shared(size_t bytes) {
  if (!shared_memory) {
    shared_memory.reset(new unsigned char[bytes]);
    std::memset(shared_memory.get(), 0xff, bytes);
    shared_bytes = bytes;
  }
  if (bytes != shared_bytes) std::abort();
  return shared_memory.get();
}

void sync_threads(const char* file, int line) {
  running->waits = Waits::for_block;
  running->file = file;
  running->line = line;
  to_scheduler();
}

void exchange(unsigned mask, void* value, size_t bytes, unsigned distance, const char* file, int line) {
  if (mask != 0xffffffffu) std::abort();  // not emulated
  Fiber* self = running;
  std::memcpy(self->lane_value, value, bytes);
  self->distance = distance;
  self->waits = Waits::for_warp;
  self->file = file;
  self->line = line;
  to_scheduler();
  std::memcpy(value, self->lane_value, bytes);
}

int launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  if (failing_launch >= 0 && failing_launch-- == 0) return cudaErrorInvalidValue;
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % kWarp != 0) return cudaErrorInvalidValue;
  if (capturing) {
    captured.push_back({blocks, threads, std::move(kernel)});
    return cudaSuccess;
  }
  ++launches;
  return run_grid(blocks, threads, kernel);
}

}  // namespace emulated

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "unspecified launch failure";
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = std::atoi(emulated::setting("REGFUSED_EMULATED_DRIVER", "13000").c_str());
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = std::atoi(emulated::setting("REGFUSED_EMULATED_MULTIPROCESSORS", "3").c_str());
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// For the tests, by ctypes.
extern "C" {

__attribute__((visibility("default"))) long emulated_launches() { return emulated::launches; }

// The n-th launch from now on fails, counted from 0.
__attribute__((visibility("default"))) void emulated_fail(int n) { emulated::failing_launch = n; }

__attribute__((visibility("default"))) void emulated_capture() {
  emulated::captured.clear();
  emulated::capturing = true;
}

__attribute__((visibility("default"))) int emulated_end_capture() {
  emulated::capturing = false;
  return static_cast<int>(emulated::captured.size());
}

__attribute__((visibility("default"))) int emulated_replay() {
  for (const auto& launch : emulated::captured)
    if (const int error = emulated::run_grid(launch.blocks, launch.threads, launch.kernel)) return error;
  return 0;
}
}
