// Slices held below a norm, every dtype in one list, against a plain loop in double.
#include "checks.h"
#include "devices.h"

namespace regfused {

namespace {

void check(const std::vector<SliceLayout>& layouts, double bound) {
  std::vector<Array> params;
  std::vector<SliceLayout> layout_of;
  for (const SliceLayout& layout : layouts)
    for (const DType dtype : kDTypes) {
      params.push_back(parameters(dtype, layout.numel(), static_cast<int64_t>(params.size())));
      layout_of.push_back(layout);
    }
  const auto [one, four] = on_one_and_on_four([&] {
    std::vector<Array> shrunk = params;
    std::vector<SliceTensor> rows;
    for (size_t t = 0; t < shrunk.size(); ++t)
      rows.push_back({shrunk[t].data(), shrunk[t].dtype(), SliceRule::max_norm, layout_of[t], bound, {}});
    shrink_slices({}, rows);
    return shrunk;
  });
  const std::string what = "max norm " + std::to_string(bound);
  expect(one == four, what + ": other bits on four threads");
  for (size_t t = 0; t < params.size(); ++t) {
    std::vector<double> want = params[t].values();
    scale_slices(want, layout_of[t], [&](double norm) { return norm > bound ? bound / norm : 1; });
    expect_near(one[t], want, 16, what + ", tensor " + std::to_string(t));
  }
}

}  // namespace

void check_max_norm() {
  for (const double bound : {0.0, 1.5, 80.0}) {
    check(kWholeSlices, bound);
    check(kOtherSlices, bound);
  }
}

}  // namespace regfused
