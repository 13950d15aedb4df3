// Shrinks slices of tensors by their norms, in parallel, on the CPU.
#include "slice_drive.h"

#include <algorithm>

#include "isa.h"

namespace regfused {

namespace {

// A run at least this long is worked on by itself: shorter ones together, column by column.
constexpr int64_t kLongRun = 1024;
static_assert(kLongRun <= kSliceColumns, "a short run fits a tile");

// Rows of a tile: a partial sum costs a sixteenth of what it is made of at most.
constexpr int64_t kTileRows = 64;

// Elements of a piece, about: for the work to be dealt out evenly.
constexpr int64_t kPiece = 16384;

// Slices whose partial sums are added up by one thread at a time.
constexpr int64_t kSlicesTogether = 256;

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
  pieces_.clear();
  slices_.clear();
  partials_.clear();
  factors_.clear();
}

size_t SlicesOnCpu::add(const SliceTensor& tensor) {
  const SliceLayout& layout = tensor.layout;
  const auto i = static_cast<int32_t>(cuts_.size());
  Cut cut{tensor, layout.inner >= kLongRun || layout.outer == 1, {}, {}, partials_.size(), factors_.size(), 1};
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
    pieces_.add(i, pieces * kPiece, kPiece);
    const int64_t additions = partials / layout.count * std::min(layout.count, kSlicesTogether);
    cut.judging = std::clamp<int64_t>(additions, 1, kLargestWork);
    slices_.add(i, (layout.count + kSlicesTogether - 1) / kSlicesTogether * cut.judging, cut.judging);
    partials_.resize(partials_.size() + partials);
    factors_.resize(factors_.size() + layout.count);
  }
  cuts_.push_back(cut);
  return i;
}

void SlicesOnCpu::set(size_t i, void* data, double bound) {
  cuts_[i].tensor.data = data;
  cuts_[i].tensor.bound = bound;
}

// f(cut, chunk) for every chunk of a tensor that is not passed by.
template <class F>
void SlicesOnCpu::for_each(const Chunks& chunks, const F& f) {
  chunks.for_each([&](size_t c) {
    const Cut& cut = cuts_[chunks[c].tensor];
    if (!cut.tensor.is_passed_by()) f(cut, chunks[c]);
  });
}

void SlicesOnCpu::shrink() {
  for_each(whole_, [&](const Cut& cut, const Chunk& chunk) { kernels_.shrink(cut.tensor, chunk.begin, chunk.size); });
  for_each(pieces_, [&](const Cut& cut, const Chunk& piece) { measure(cut, piece); });
  for_each(slices_, [&](const Cut& cut, const Chunk& slices) { judge(cut, slices); });
  for_each(pieces_, [&](const Cut& cut, const Chunk& piece) { scale(cut, piece); });
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

// The factors of some slices, whose partial sums lie side by side.
void SlicesOnCpu::judge(const Cut& cut, const Chunk& chunk) {
  const int64_t begin = chunk.begin / cut.judging * kSlicesTogether;
  const int64_t n = std::min(kSlicesTogether, cut.tensor.layout.count - begin);
  const double* partials = partials_.data() + cut.partials;
  double squares[kSlicesTogether] = {};
  if (cut.by_segments) {
    for (int64_t t = 0; t < cut.segments.terms(); ++t)
      for (int64_t i = 0; i < n; ++i) squares[i] += cut.segments.term(partials, begin + i, t);
  } else {
    for (int64_t row_tile = 0; row_tile < cut.columns.row_tiles; ++row_tile)
      for (int64_t repetition = 0; repetition < cut.columns.repetitions; ++repetition)
        for (int64_t i = 0; i < n; ++i) squares[i] += cut.columns.term(partials, begin + i, row_tile, repetition);
  }
  for (int64_t i = 0; i < n; ++i)
    factors_[cut.factors + begin + i] =
        slice_factor(cut.tensor.rule, cut.tensor.bound, norm_finish(NormType::two, squares[i]));
}

void SlicesOnCpu::scale(const Cut& cut, const Chunk& chunk) {
  const int64_t piece = chunk.begin / kPiece;
  const double* factors = factors_.data() + cut.factors;
  if (!cut.by_segments) return kernels_.scale_tile(cut.tensor, cut.columns.tile(piece), factors);
  const SliceSegments::Segment segment = cut.segments.segment(piece);
  kernels_.scale_segment(cut.tensor, segment, factors[segment.slice]);
}

}  // namespace regfused
