// A block of the CUDA matrix product, emulated on the CPU. The index arithmetic is the kernels' own
// (kernels/matrix_tile.h); ldmatrix and mma are written here from their description in the PTX ISA.
#include "../kernels/matrix_tile.h"

#include <array>

#include "../kernels/numeric.h"
#include "arrays.h"

namespace ensadv {
namespace {

// Shared memory. Elements are floats for every T; chunk c holds the elements from c * per_chunk on.
struct Memory {
  std::vector<float> values;
  std::vector<bool> filled;
  int per_chunk;

  Memory(int chunks, int per_chunk)
      : values(size_t(chunks * per_chunk)), filled(size_t(chunks)), per_chunk(per_chunk) {}
  float* chunk(int c) { return values.data() + c * per_chunk; }
};

template <class Shared>
Memory copy_to_tile(const Dense<float>& matrix) {
  require(matrix.ndim() == 2 && matrix.shape(0) == Shared::kRows &&
              matrix.shape(1) == Shared::kChunks * Shared::kElements,
          "the operand must fill the tile");
  Memory memory(Shared::kCount, Shared::kElements);
  for (int c = 0; c < Shared::kCount; ++c) {
    const int row = c / Shared::kChunks, chunk = c % Shared::kChunks, at = Shared::at(row, chunk);
    require(at >= 0 && at < Shared::kCount && !memory.filled[size_t(at)], "two chunks in one place");
    memory.filled[size_t(at)] = true;
    std::copy_n(matrix.data(row, chunk * Shared::kElements), Shared::kElements, memory.chunk(at));
  }
  return memory;
}

// Word q of lane l is two elements of matrix q. The eight lanes from 8q on give the addresses of the matrix's rows.
// Lane l gets row l / 4, columns 2 (l % 4) and the next; if transposed, column l / 4 and those rows.
using Words = std::array<std::array<std::array<float, 2>, 4>, kWarpLanes>;

template <class ChunkOf>
Words load_matrices(Memory& memory, bool transposed, ChunkOf chunk_of) {
  Words words;
  for (int q = 0; q < 4; ++q) {
    uint32_t banks = 0;
    for (int r = 0; r < 8; ++r) banks |= 1u << chunk_of(q * 8 + r) % 8;
    require(banks == 0xff, "ldmatrix reads one bank twice");
    for (int l = 0; l < kWarpLanes; ++l)
      for (int e = 0; e < 2; ++e) {
        const int major = l / 4, minor = l % 4 * 2 + e;
        words[size_t(l)][size_t(q)][size_t(e)] = transposed ? memory.chunk(chunk_of(q * 8 + minor))[major]
                                                            : memory.chunk(chunk_of(q * 8 + major))[minor];
      }
  }
  return words;
}

// c += a @ b for one mma.m16n8k16; b's two words begin at `first`.
void mma(std::array<std::array<float, 4>, kWarpLanes>& c, const Words& a, const Words& b, int first) {
  float left[16][16], right[16][8];
  for (int l = 0; l < kWarpLanes; ++l)
    for (int e = 0; e < 2; ++e) {
      for (int q = 0; q < 4; ++q)
        left[l / 4 + q % 2 * 8][l % 4 * 2 + q / 2 * 8 + e] = a[size_t(l)][size_t(q)][size_t(e)];
      for (int q = 0; q < 2; ++q) right[l % 4 * 2 + q * 8 + e][l / 4] = b[size_t(l)][size_t(first + q)][size_t(e)];
    }
  for (int l = 0; l < kWarpLanes; ++l)
    for (int v = 0; v < 4; ++v)
      for (int k = 0; k < 16; ++k)
        c[size_t(l)][size_t(v)] += left[l / 4 + v / 2 * 8][k] * right[k][l % 4 * 2 + v % 2];
}

// The results, each of which must be written once.
struct Results {
  Dense<float> out;
  std::vector<bool> filled;

  Results(int rows, int cols) : out({rows, cols}), filled(size_t(rows * cols)) {}
  void put(int row, int col, float v) {
    const size_t at = size_t(row * out.shape(1) + col);
    require(row >= 0 && row < out.shape(0) && col >= 0 && col < out.shape(1) && !filled[at], "a result written twice");
    filled[at] = true;
    out.mutable_at(row, col) = v;
  }
};

template <class Tile>
Dense<float> multiply(const Dense<float>& a, const Dense<float>& b) {
  Memory left = copy_to_tile<typename Tile::A>(a), right = copy_to_tile<typename Tile::B>(b);
  Results results(Tile::kM, Tile::kN);
  if constexpr (sizeof(typename Tile::T) == 4) {
    using Share = PlainShare<Tile>;
    for (int thread = 0; thread < Tile::kThreads; ++thread)
      for (int i = 0; i < Share::kRows; ++i)
        for (int j = 0; j < Share::kCols; ++j) {
          const int row = Share::row(thread, i), col = Share::col(thread, j);
          float sum = 0.0f;
          for (int k = 0; k < Tile::kK; ++k)
            sum += left.chunk(Tile::A::at(row, k / 4))[k % 4] *
                   (Tile::kInnerFirst ? right.chunk(Tile::B::at(k, col / 4))[col % 4]
                                  : right.chunk(Tile::B::at(col, k / 4))[k % 4]);
          results.put(row, col, sum);
        }
  } else {
    for (int warp = 0; warp < Tile::kWarps; ++warp)
      for (int i = 0; i < Tile::kAtomsM; ++i)
        for (int j = 0; j < Tile::kAtomsN; ++j) {
          std::array<std::array<float, 4>, kWarpLanes> sum{};
          for (int step = 0; step < Tile::kSteps; ++step)
            mma(sum, load_matrices(left, false, [&](int l) { return Tile::a_chunk(warp, l, i, step); }),
                load_matrices(right, Tile::kInnerFirst, [&](int l) { return Tile::b_chunk(warp, l, j / 2, step); }),
                j % 2 * 2);
          for (int l = 0; l < kWarpLanes; ++l)
            for (int v = 0; v < 4; ++v)
              results.put(Tile::out_row(warp, l, i, v), Tile::out_col(warp, l, j, v), sum[size_t(l)][size_t(v)]);
        }
  }
  return results.out;
}

template <class T>
Dense<float> multiply_by(const std::string& tile, bool inner_first, const Dense<float>& a, const Dense<float>& b) {
  if constexpr (sizeof(T) == 2)
    if (tile == "large") return inner_first ? multiply<LargeTile<T, true>>(a, b) : multiply<LargeTile<T, false>>(a, b);
  require(tile == "small", "no such tile");
  return inner_first ? multiply<SmallTile<T, true>>(a, b) : multiply<SmallTile<T, false>>(a, b);
}

Dense<float> matrix_tile(const Dense<float>& a, const Dense<float>& b, const std::string& dtype,
                         const std::string& tile, bool inner_first) {
  if (dtype == "float32") return multiply_by<float>(tile, inner_first, a, b);
  return multiply_by<half_t>(tile, inner_first, a, b);
}

// The chunk as the kernels mask it: elements whose bit in `keep` is 0 become 0.
template <class T>
Dense<T> kept(Dense<T> chunk, uint32_t keep) {
  require(chunk.nbytes() == 16, "a chunk has 16 bytes");
  uint32_t words[4];
  memcpy(words, chunk.data(), 16);
  for (int w = 0; w < 4; ++w) words[w] &= kept_bits<T>(keep, w);
  Dense<T> result(chunk.size());
  memcpy(result.mutable_data(), words, 16);
  return result;
}

}  // namespace

void bind_matrix_tile(py::module_& m) {
  m.def("matrix_tile", &matrix_tile, py::arg("a"), py::arg("b"), py::arg("dtype"), py::arg("tile"),
        py::arg("inner_first"));
  m.def("kept", &kept<float>, py::arg("chunk").noconvert(), py::arg("keep"));
  m.def("kept", &kept<uint16_t>, py::arg("chunk").noconvert(), py::arg("keep"));
}

}  // namespace ensadv
