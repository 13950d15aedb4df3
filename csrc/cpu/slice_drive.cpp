// Shrinks slices of tensors by their norms, in parallel, on the CPU.
#include "slice_drive.h"

#include <algorithm>
#include <functional>

#include "isa.h"

namespace regfused {

namespace {

// A run at least this long is worked on by itself: shorter ones together, column by column.
constexpr int64_t kLongRun = 1024;
static_assert(kLongRun <= kSliceColumns, "a short run fits a tile");
static_assert(kMostInChunk == Chunks::kSize);

// Rows of a tile: a partial sum costs a sixteenth of what it is made of at most.
constexpr int64_t kTileRows = 64;

// Elements of a piece, about: for the work to be dealt out evenly.
constexpr int64_t kPiece = 16384;

// Slices whose partial sums are added up by one thread at a time.
constexpr int64_t kSlicesTogether = 256;

// Elements of a batch for each thread, unless one tensor has more.
constexpr int64_t kBatch = int64_t(1) << 18;

constexpr int64_t kLargestWork = int64_t(1) << 30;  // of a chunk

}  // namespace

int64_t SlicesOnCpu::chunk_of_slices(const SliceLayout& layout) {
  if (layout.outer != 1 || layout.inner == 0 || layout.inner > Chunks::kSize) return 0;
  // Short slices are worked on in stretches of whole ones, which had better be long.
  const int64_t together = std::max(kSliceColumns / layout.inner * layout.inner, layout.inner);
  return Chunks::kSize / together * together;
}

void SlicesOnCpu::clear() {
  kernels_ = choose_kernels()->slice;
  cuts_.clear();
  whole_.clear();
  batches_.clear();
  partials_.clear();
  factors_.clear();
  radii_.clear();
}

size_t SlicesOnCpu::add(const SliceTensor& tensor) {
  const SliceLayout& layout = tensor.layout;
  const auto i = static_cast<int32_t>(cuts_.size());
  Cut cut{tensor, layout.inner >= kLongRun || layout.outer == 1, {}, {}, partials_.size(), factors_.size(), 0, 1};
  if (const int64_t size = chunk_of_slices(layout)) {
    whole_.add(i, layout.numel(), size);
  } else if (layout.numel() > 0) {
    int64_t pieces, partials;
    if (cut.by_segments) {
      cut.segments = SliceSegments(layout, kPiece);
      pieces = cut.segments.pieces();
      partials = cut.segments.partials();
    } else {
      cut.columns = SliceColumns(layout, kSliceWidth, kTileRows, 1);
      pieces = cut.columns.pieces();
      partials = cut.columns.partials();
    }
    Batch& batch = batch_for(layout.numel());
    batch.end_cut = cuts_.size() + 1;
    batch.numel += layout.numel();
    batch.pieces.add(i, pieces * kPiece, kPiece);
    const int64_t additions = partials / layout.count * std::min(layout.count, kSlicesTogether);
    cut.judging = std::clamp<int64_t>(additions, 1, kLargestWork);
    batch.slices.add(i, (layout.count + kSlicesTogether - 1) / kSlicesTogether * cut.judging, cut.judging);
    cut.plane = partials;
    partials_.resize(partials_.size() + partials);
    factors_.resize(factors_.size() + layout.count);
  }
  cuts_.push_back(cut);
  return i;
}

// The last batch, or a new one where a tensor of this many elements would make it too large.
SlicesOnCpu::Batch& SlicesOnCpu::batch_for(int64_t numel) {
  if (batches_.empty() || batches_.back().numel + numel > kBatch * at::get_num_threads()) {
    Batch batch;
    batch.first_cut = cuts_.size();
    batch.first_piece = pieces();
    batches_.push_back(batch);
  }
  return batches_.back();
}

void SlicesOnCpu::set(size_t i, const SliceTensor& tensor) {
  SliceTensor& here = cuts_[i].tensor;
  here.data = tensor.data;
  here.bound = tensor.bound;
  here.metric = tensor.metric;
}

// f(cut, chunk, c) for every chunk of a tensor that is not passed by.
template <class F>
void SlicesOnCpu::for_each(const Chunks& chunks, const F& f) {
  chunks.for_each([&](size_t c) {
    const Cut& cut = cuts_[chunks[c].tensor];
    if (!cut.tensor.is_passed_by()) f(cut, chunks[c], c);
  });
}

void SlicesOnCpu::shrink(const Make& make) {
  for_each(whole_,
           [&](const Cut& cut, const Chunk& chunk, size_t) { kernels_.shrink(cut.tensor, chunk.begin, chunk.size); });
  begin_search();
  for (Batch& batch : batches_) shrink(batch, make);
}

void SlicesOnCpu::shrink(Batch& batch, const Make& make) {
  for_each(batch.pieces, [&](const Cut& cut, const Chunk& piece, size_t c) {
    if (make) make_piece(make, batch.first_piece + c, cut, piece);
    cut.tensor.metric ? sum(cut, piece) : measure(cut, piece);
  });
  for_each(batch.slices, [&](const Cut& cut, const Chunk& chunk, size_t) {
    cut.tensor.metric ? make_radii(cut, chunk) : make_factors(cut, chunk);
  });
  for (int i = 1; i < kMostRadii && is_search_open(batch); ++i) {
    for_each(batch.pieces, [&](const Cut& cut, const Chunk& piece, size_t) {
      if (cut.open) sum(cut, piece);
    });
    for_each(batch.slices, [&](const Cut& cut, const Chunk& chunk, size_t) {
      if (cut.open) make_radii(cut, chunk);
    });
  }
  for_each(batch.pieces, [&](const Cut& cut, const Chunk& piece, size_t) {
    cut.tensor.metric ? shrink_to_radii(cut, piece) : scale(cut, piece);
  });
}

void SlicesOnCpu::make_piece(const Make& make, size_t number, const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  const auto make_elements = [&](int64_t begin, int64_t n) {
    make(chunk.tensor, number, Chunk{chunk.tensor, static_cast<int32_t>(n), begin});
  };
  if (cut.by_segments) {
    const SliceSegments::Segment segment = cut.segments.segment(piece);
    return make_elements(segment.begin, segment.size);
  }
  const SliceTile tile = cut.columns.tile(piece);
  // Rows of whole width lie together.
  const bool together = tile.columns == tile.stride;
  const int64_t n = together ? tile.rows * tile.columns : tile.columns;
  for (int64_t row = 0; row < (together ? 1 : tile.rows); ++row) {
    const int64_t begin = tile.begin + row * tile.stride;
    if (begin < tile.numel) make_elements(begin, std::min(n, tile.numel - begin));
  }
}

void SlicesOnCpu::begin_search() {
  if (std::none_of(cuts_.begin(), cuts_.end(), [](const Cut& cut) { return cut.is_searched(); })) return;
  radii_.assign(factors_.size(), SliceRadius{});
  sums_.resize(partials_.size() * SliceSums::kCount);
}

bool SlicesOnCpu::is_search_open(const Batch& batch) {
  const auto is_open = [&](const Cut& cut) {
    if (!cut.is_searched()) return false;
    const auto* radii = radii_.data() + cut.factors;
    return std::any_of(radii, radii + cut.tensor.layout.count, [](const SliceRadius& r) { return r.open; });
  };
  bool open = false;
  for (size_t i = batch.first_cut; i < batch.end_cut; ++i) open |= cuts_[i].open = is_open(cuts_[i]);
  return open;
}

void SlicesOnCpu::measure(const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  double* partials = partials_.data() + cut.partials;
  if (cut.by_segments) {
    partials[piece] = kernels_.measure_segment(cut.tensor, cut.segments.segment(piece));
  } else {
    const SliceTile tile = cut.columns.tile(piece);
    kernels_.measure_tile(cut.tensor, tile, partials + cut.columns.first_partial(piece, tile));
  }
}

// f(begin, n) for some slices, whose partial sums lie side by side.
template <class F>
void SlicesOnCpu::for_slices(const Cut& cut, const Chunk& chunk, const F& f) {
  const int64_t begin = chunk.begin / cut.judging * kSlicesTogether;
  f(begin, std::min(kSlicesTogether, cut.tensor.layout.count - begin));
}

// The sums of n slices from the partial sums of a plane.
template <class Combine>
void SlicesOnCpu::add_up(const Cut& cut, const double* partials, int64_t begin, int64_t n, double* sums,
                         const Combine& combine) {
  if (cut.by_segments) {
    for (int64_t t = 0; t < cut.segments.terms(); ++t)
      for (int64_t i = 0; i < n; ++i) sums[i] = combine(sums[i], cut.segments.term(partials, begin + i, t));
  } else {
    for (int64_t row_tile = 0; row_tile < cut.columns.row_tiles; ++row_tile)
      for (int64_t repetition = 0; repetition < cut.columns.repetitions; ++repetition)
        for (int64_t i = 0; i < n; ++i)
          sums[i] = combine(sums[i], cut.columns.term(partials, begin + i, row_tile, repetition));
  }
}

void SlicesOnCpu::make_factors(const Cut& cut, const Chunk& chunk) {
  for_slices(cut, chunk, [&](int64_t begin, int64_t n) {
    double squares[kSlicesTogether] = {};
    add_up(cut, partials_.data() + cut.partials, begin, n, squares, std::plus<double>());
    for (int64_t i = 0; i < n; ++i)
      factors_[cut.factors + begin + i] =
          slice_factor(cut.tensor.rule, cut.tensor.bound, norm_finish(NormType::two, squares[i]));
  });
}

void SlicesOnCpu::scale(const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  const double* factors = factors_.data() + cut.factors;
  if (!cut.by_segments) return kernels_.scale_tile(cut.tensor, cut.columns.tile(piece), factors);
  const SliceSegments::Segment segment = cut.segments.segment(piece);
  kernels_.scale_segment(cut.tensor, segment, factors[segment.slice]);
}

// --- In a metric ----------------------------------------------------------------------------------

void SlicesOnCpu::sum(const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  double* sums = sums_.data() + cut.partials * SliceSums::kCount;
  const SliceRadius* radii = radii_.data() + cut.factors;
  if (cut.by_segments) {
    const SliceSegments::Segment segment = cut.segments.segment(piece);
    const SliceRadius& radius = radii[segment.slice];
    if (radius.open) kernels_.sum_segment(cut.tensor, segment, radius, sums + piece, cut.plane);
  } else {
    const SliceTile tile = cut.columns.tile(piece);
    kernels_.sum_tile(cut.tensor, tile, radii, sums + cut.columns.first_partial(piece, tile), cut.plane);
  }
}

void SlicesOnCpu::make_radii(const Cut& cut, const Chunk& chunk) {
  const double* sums = sums_.data() + cut.partials * SliceSums::kCount;
  const bool doubles = cut.tensor.dtype == DType::float64;
  const RadiusPrecision precision = doubles ? radius_precision<double>() : radius_precision<float>();
  for_slices(cut, chunk, [&](int64_t begin, int64_t n) {
    double squares[kSlicesTogether] = {}, second[kSlicesTogether] = {}, third[kSlicesTogether] = {},
           largest[kSlicesTogether] = {};
    add_up(cut, sums, begin, n, squares, std::plus<double>());
    add_up(cut, sums + cut.plane, begin, n, second, std::plus<double>());
    add_up(cut, sums + 2 * cut.plane, begin, n, third, std::plus<double>());
    add_up(cut, sums + 3 * cut.plane, begin, n, largest, [](double a, double b) { return a > b ? a : b; });
    for (int64_t i = 0; i < n; ++i) {
      SliceRadius& radius = radii_[cut.factors + begin + i];
      if (radius.open) radius = next_radius(radius, {squares[i], second[i], third[i], largest[i]}, precision);
    }
  });
}

void SlicesOnCpu::shrink_to_radii(const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  const SliceRadius* radii = radii_.data() + cut.factors;
  if (!cut.by_segments) return kernels_.shrink_tile(cut.tensor, cut.columns.tile(piece), radii);
  const SliceSegments::Segment segment = cut.segments.segment(piece);
  kernels_.shrink_segment(cut.tensor, segment, radii[segment.slice]);
}

}  // namespace regfused
