// The device functions of csrc/cuda as plain C functions, for tests/test_cuda_kernels.py.
#include "../csrc/cuda/access.h"

using namespace zk;

extern "C" {

void t_philox(uint64_t seed, uint32_t row, uint32_t param_id, uint32_t stream, const uint32_t* c0,
              int64_t count, uint32_t* out) {
  const RowState s = row_state(seed, row, param_id, static_cast<Stream>(stream));
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords w = philox_words(s, c0[i]);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w.w[j];
  }
}

// How far normal_pair and numeric.h's box_muller are apart at most; NaN counts as infinitely far.
double t_normals_differ(const uint32_t* a, const uint32_t* b, int64_t count) {
  double most = 0.0;
  const auto meet = [&](double x, double y) {
    const double far = std::fabs(x - y);
    if (!(far <= most)) most = far == far ? far : INFINITY;
  };
  for (int64_t i = 0; i < count; ++i) {
    float p, q, x, y;
    normal_pair(a[i], b[i], p, q);
    box_muller(a[i], b[i], x, y);
    meet(p, x);
    meet(q, y);
  }
  return most;
}

void t_round(int dtype, int stochastic_, const float* x, const uint32_t* r16, int64_t count,
             float* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == 1)
      out[i] = stochastic_ ? stochastic<DType::bf16>(x[i], r16[i]) : nearest<DType::bf16>(x[i]);
    else
      out[i] = stochastic_ ? stochastic<DType::f16>(x[i], r16[i]) : nearest<DType::f16>(x[i]);
  }
}

// row, group, l and column of a unit.
void t_unit(int columns, int64_t index, int64_t col_offset, int64_t cols, int pairs, int64_t* out) {
  const Cut cut = cut_columns(col_offset, cols, pairs != 0);
  const Unit u =
      columns == 8 ? unit_at<8>(index, cut, col_offset) : unit_at<4>(index, cut, col_offset);
  out[0] = u.row;
  out[1] = u.group;
  out[2] = u.l;
  out[3] = u.col;
}

int64_t t_units(int columns, int64_t rows, int64_t col_offset, int64_t cols, int pairs) {
  return units_of(rows, cut_columns(col_offset, cols, pairs != 0), columns);
}

// z of a unit's columns: out[quarter][column].
void t_draw(int distribution, uint64_t seed, uint32_t row, uint32_t param_id, uint32_t group,
            uint32_t l, int columns, float* out) {
  const RowState s = row_state(seed, row, param_id, Stream::direction);
  const auto fill = [&](const auto& draw) {
    for (int i = 0; i < columns; ++i) {
      float z[4];
      draw.column(static_cast<uint32_t>(i), z);
      for (int j = 0; j < 4; ++j) out[j * columns + i] = z[j];
    }
  };
  if (distribution == 0)
    fill(Draw<Distribution::gaussian>(s, group, l));
  else
    fill(Draw<Distribution::rademacher>(s, group, l));
}

int t_entry_of(const int64_t* first_tiles, int count, int64_t tile) {
  std::vector<Entry> entries(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) entries[static_cast<size_t>(i)].first_tile = first_tiles[i];
  const Table table{entries.data(), count, 0};
  return entry_of(table, tile);
}
}
