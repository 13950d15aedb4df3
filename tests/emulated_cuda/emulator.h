// Runs kernels on the host, one block after another, each thread of a block as a fiber.
//
// A fiber runs until it waits for others, then the next one does: warp after warp, forwards or backwards, each as far
// as it gets; or all at random. Shared memory is filled with NaN before each block. So a missing barrier shows, and
// memory out of bounds is found by AddressSanitizer, as every block's shared memory is an allocation of its own.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the fiber that runs.
extern Index threadIdx, blockIdx, blockDim, gridDim;

// The block's shared memory; one variable for each kernel.
void* shared(size_t bytes);

void sync_threads(const char* file, int line);

// Hands in a lane's 8 bytes at most, waits for the warp, and gives those of the lane `distance` further on (of the
// lane itself, where there is none).
void exchange(unsigned mask, void* value, size_t bytes, unsigned distance, const char* file, int line);

template <class T>
T shuffle_down(unsigned mask, T value, unsigned distance, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  exchange(mask, &value, sizeof value, distance, file, line);
  return value;
}

// Runs a grid, or notes it down during a capture. A cudaError_t.
int launch(unsigned blocks, unsigned threads, std::function<void()> kernel);

}  // namespace emulated
