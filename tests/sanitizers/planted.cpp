// Lies told to the real kernels, one for each kind of mistake that a sanitizer must see.
#include "planted.h"

#include <cstring>
#include <thread>

#include "array.h"
#include "cpu/isa.h"

namespace regfused {

namespace {

struct Step {
  Array param, grad;
  StepRow row;
  StepHyper hyper;
  StepScalars scalars;
  StepPartial partial;

  explicit Step(int64_t numel)
      : param(parameters(DType::float32, numel, 0)), grad(gradients(DType::float32, numel, 1)) {
    row.param = param.data();
    row.grad = grad.data();
    row.numel = numel;
    hyper.set_own(SgdHyper());
  }
  void run(int32_t size) { choose_kernels()->step.step[0](row, {0, size, 0}, hyper, {}, scalars, partial); }
};

// A row of vectors that ends behind the array.
void long_row() { Step(63).run(64); }

// The copy of a short row that ends behind the array.
void long_tail() { Step(33).run(34); }

void shared_chunk() {
  Step step(64), twin(64);
  twin.row = step.row;
  std::thread other([&] { twin.run(64); });
  step.run(64);
  other.join();
}

void uninitialised_gradient() {
  Step step(64);
  const Array grad(DType::float32, 64);
  step.row.grad = grad.data();
  step.scalars.norm_type = NormType::inf;
  choose_kernels()->step.norm(step.row, {0, 64, 0}, step.hyper, step.scalars, step.partial);
}

void no_bool() {
  Step step(64);
  std::memset(&step.hyper.maximize, 0xcd, sizeof step.hyper.maximize);
  step.run(64);
}

constexpr struct {
  const char* name;
  void (*plant)();
} kPlants[] = {
    {"long row", long_row},         {"long tail", long_tail},
    {"shared chunk", shared_chunk}, {"uninitialised gradient", uninitialised_gradient},
    {"no bool", no_bool},
};

}  // namespace

}  // namespace regfused

bool regfused_plant(const char* name) {
  for (const auto& plant : regfused::kPlants)
    if (std::strcmp(name, plant.name) == 0) {
      plant.plant();
      return true;
    }
  return false;
}
