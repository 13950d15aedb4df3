// Tensors cut into pieces for the norms of their slices: each piece makes partial sums of squares,
// which are added up in an order that depends on the shape alone. No torch in here.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "rule/slice_rule.h"

namespace regfused {

// Long runs, each cut into segments; a segment makes one partial sum.
struct SliceSegments {
  SliceLayout layout;
  int64_t size = 1;     // elements of a segment; the last one of a run may be shorter
  int64_t per_run = 1;  // segments

  struct Segment {
    int64_t begin, size, slice;
  };

  SliceSegments() = default;
  SliceSegments(const SliceLayout& layout, int64_t size)
      : layout(layout), size(size), per_run((layout.inner + size - 1) / size) {}

  REGFUSED_RULE int64_t pieces() const { return layout.outer * layout.count * per_run; }
  REGFUSED_RULE int64_t partials() const { return pieces(); }
  REGFUSED_RULE Segment segment(int64_t piece) const {
    const int64_t run = piece / per_run, first = piece % per_run * size;
    const int64_t rest = layout.inner - first;
    return {run * layout.inner + first, rest < size ? rest : size, run % layout.count};
  }

  // Partial sums of a slice, term by term.
  REGFUSED_RULE int64_t terms() const { return layout.outer * per_run; }
  REGFUSED_RULE double term(const double* partials, int64_t slice, int64_t t) const {
    return partials[(t / per_run * layout.count + slice) * per_run + t % per_run];
  }
};

// A piece of short runs that lie side by side: rows x columns.
struct SliceTile {
  int64_t begin = 0;   // first element
  int64_t rows = 0;    //
  int64_t stride = 0;  // elements from row to row
  int64_t numel = 0;   // of the tensor, which may end within the tile
  int64_t inner = 1;
  int64_t first_run = 0;  // of the row, which the first column is in
  int32_t offset = 0;     // of the first column in its run
  int32_t columns = 0;

  REGFUSED_RULE int32_t runs() const { return static_cast<int32_t>((offset + columns + inner - 1) / inner); }
  // Of run i of the tile: its columns are [begin_of(i), begin_of(i + 1)).
  REGFUSED_RULE int32_t begin_of(int32_t i) const {
    const int64_t at = i * inner - offset;
    return static_cast<int32_t>(at < 0 ? 0 : at > columns ? columns : at);
  }
};

// Short runs. Memory is looked at as rows of equal length, of one or more repetitions of all slices;
// the last row may be short. A tile makes a partial sum for each of its runs. A run is no longer than a
// tile is wide, so that it lies in one or two tiles.
struct SliceColumns {
  SliceLayout layout;
  int64_t repetitions = 1;   // of all slices, in a row
  int64_t runs = 0;          // of a row
  int64_t row = 0;           // elements
  int64_t rows = 0;          //
  int64_t tile_rows = 1;     //
  int32_t width = 0;         // log2 of a tile's columns
  int64_t row_tiles = 0;     //
  int64_t column_tiles = 0;  //

  SliceColumns() = default;
  // A row has `multiple` repetitions or a multiple of it, as many as fill a tile, unless there are fewer.
  SliceColumns(const SliceLayout& layout, int32_t width, int64_t rows_of_tile, int64_t multiple)
      : layout(layout), width(width) {
    const int64_t columns = int64_t(1) << width, all = layout.count * layout.inner;
    repetitions = (columns + all * multiple - 1) / (all * multiple) * multiple;
    if (repetitions > layout.outer) repetitions = layout.outer;
    runs = repetitions * layout.count;
    row = runs * layout.inner;
    rows = (layout.outer + repetitions - 1) / repetitions;
    tile_rows = rows_of_tile < rows ? rows_of_tile : rows;
    row_tiles = (rows + tile_rows - 1) / tile_rows;
    column_tiles = (row + columns - 1) >> width;
  }

  REGFUSED_RULE int64_t pieces() const { return row_tiles * column_tiles; }
  // A run and the tile it lies in number the partial sums of a row of tiles: both only grow.
  REGFUSED_RULE int64_t partials() const { return row_tiles * partials_of_row(); }
  REGFUSED_RULE int64_t partials_of_row() const { return column_tiles + runs; }

  REGFUSED_RULE SliceTile tile(int64_t piece) const {
    const int64_t first_row = piece / column_tiles * tile_rows, first = (piece % column_tiles) << width;
    const int64_t rest = row - first, rows_left = rows - first_row;
    SliceTile tile;
    tile.begin = first_row * row + first;
    tile.rows = rows_left < tile_rows ? rows_left : tile_rows;
    tile.stride = row;
    tile.numel = layout.numel();
    tile.inner = layout.inner;
    tile.first_run = first / layout.inner;
    tile.offset = static_cast<int32_t>(first % layout.inner);
    tile.columns = static_cast<int32_t>(rest < (int64_t(1) << width) ? rest : int64_t(1) << width);
    return tile;
  }
  // Where the partial sum of the first run of a tile goes; those of its other runs follow.
  REGFUSED_RULE int64_t first_partial(int64_t piece, const SliceTile& tile) const {
    return piece / column_tiles * partials_of_row() + piece % column_tiles + tile.first_run;
  }

  // Partial sums of a slice, term by term: repetition by repetition, from one row of tiles to the next.
  REGFUSED_RULE int64_t terms() const { return row_tiles * repetitions; }
  REGFUSED_RULE double term(const double* partials, int64_t slice, int64_t t) const {
    return term(partials, slice, t / repetitions, t % repetitions);
  }
  REGFUSED_RULE double term(const double* partials, int64_t slice, int64_t row_tile, int64_t repetition) const {
    const int64_t run = repetition * layout.count + slice, begin = run * layout.inner;
    if (row_tile * tile_rows * row + begin >= layout.numel()) return 0;  // beyond the short last row
    const int64_t tile = begin >> width, last = (begin + layout.inner - 1) >> width;
    const double* at = partials + row_tile * partials_of_row() + run;
    return last == tile ? at[tile] : at[tile] + at[last];
  }
};

}  // namespace regfused
