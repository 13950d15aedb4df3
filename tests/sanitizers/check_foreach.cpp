// Passes over lists of tensors, every dtype and size in one list, against plain loops in double.
#include "checks.h"
#include "devices.h"

namespace regfused {

namespace {

using Arrays = std::vector<Array>;

Arrays make(int64_t salt) {
  Arrays arrays;
  for (const Kind& kind : kinds_of_arrays())
    arrays.push_back(parameters(kind.dtype, kind.numel, salt + static_cast<int64_t>(arrays.size())));
  return arrays;
}

Arrays uninitialised(const Arrays& like) {
  Arrays arrays;
  for (const Array& array : like) arrays.emplace_back(array.dtype(), array.numel());
  return arrays;
}

ForeachList list_of(const Arrays& arrays, const Arrays* out = nullptr) {
  ForeachList list;
  for (size_t t = 0; t < arrays.size(); ++t)
    list.push_back({arrays[t].data(), out ? (*out)[t].data() : nullptr, arrays[t].numel(), arrays[t].dtype()});
  return list;
}

// Over all elements: f(sum so far, element).
template <class F>
double fold(const Arrays& arrays, const F& f) {
  double sum = 0;
  for (const Array& array : arrays)
    for (int64_t i = 0; i < array.numel(); ++i) sum = f(sum, array[i]);
  return sum;
}

double norm_by_formula(const Arrays& arrays, NormType type) {
  return type == NormType::one   ? fold(arrays, [](double sum, double x) { return sum + std::abs(x); })
         : type == NormType::two ? std::sqrt(fold(arrays, [](double sum, double x) { return sum + x * x; }))
                                 : fold(arrays, [](double sum, double x) { return std::max(sum, std::abs(x)); });
}

void check_clip(NormType type) {
  const std::string what = "clip, norm " + std::string(type == NormType::one   ? "1"
                                                       : type == NormType::two ? "2"
                                                                               : "inf");
  const Arrays grads = make(0);
  const double want = norm_by_formula(grads, type), max_norm = want / 3;
  const auto [one, four] = on_one_and_on_four([&] {
    Arrays clipped = grads;
    const auto device = make_foreach_device({});
    const at::Tensor norms = device->norms(list_of(clipped), type);
    const at::Tensor norm = device->clip(list_of(clipped), norms, type, max_norm);
    return std::pair(std::move(clipped), norm.item().toDouble());
  });
  expect(one == four, what + ": other bits on four threads");
  expect_near(one.second, want, what);
  for (size_t t = 0; t < grads.size(); ++t) {
    std::vector<double> scaled = grads[t].values();
    for (double& x : scaled) x *= max_norm / (want + 1e-6);
    expect_near(one.first[t], scaled, 16, what + ", tensor " + std::to_string(t));
  }
}

void check_penalty(double l1, double l2) {
  const std::string what = "penalty " + std::to_string(l1) + ", " + std::to_string(l2);
  const Arrays params = make(7);
  at::Tensor gain(1);
  *static_cast<double*>(gain.data_ptr()) = 0.75;
  const auto [one, four] = on_one_and_on_four([&] {
    Arrays grads = uninitialised(params);
    const auto device = make_foreach_device({});
    const at::Tensor sums = device->penalties(list_of(params), l1, l2);
    device->penalty_gradients(list_of(params, &grads), l1, l2, gain);
    return std::pair(std::move(grads), device->clip({}, sums, NormType::one, 0).item().toDouble());
  });
  expect(one == four, what + ": other bits on four threads");
  expect_near(one.second, fold(params, [&](double sum, double p) { return sum + l1 * std::abs(p) + l2 * p * p; }),
              what);
  for (size_t t = 0; t < params.size(); ++t) {
    std::vector<double> want = params[t].values();
    for (double& p : want) p = 0.75 * (l1 * (p > 0 ? 1 : p < 0 ? -1 : 0) + 2 * l2 * p);
    expect_near(one.first[t], want, 16, what + ", gradient of tensor " + std::to_string(t));
  }
}

}  // namespace

void check_foreach() {
  for (const NormType type : {NormType::one, NormType::two, NormType::inf}) check_clip(type);
  check_penalty(0.3, 0);
  check_penalty(0.3, 0.7);
}

}  // namespace regfused
