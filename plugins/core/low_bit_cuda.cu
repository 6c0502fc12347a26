/* The functions of low_bit_cuda.h: check, choose a kernel and its grid, queue it. */
#include "low_bit_cuda.h"

#include "low_bit_gather.cuh"
#include "low_bit_matmul.cuh"
#include "low_bit_matmul_many.cuh"

namespace {

using namespace jpq;

/* Blocks wanted before K is split no further: a guess, not yet measured on a GPU. A constant and not the GPU's size, so
 * that results do not depend on the machine. */
constexpr int64_t WANTED_BLOCKS = 128;
constexpr int64_t MOST_GRID_Y = 65535;

Weight weight_of(const jpq_weight &w) {
  const int64_t groups = w.k / w.group_size;
  return {w.packed, w.zeros, w.scales, w.n, jpq_bytes(w.k, w.bits), jpq_bytes(groups, w.bits),
          (int)w.k, w.group_size, (int)groups, w.bits};
}

/* Rows of X a block of the few-row kernel takes, and rows of W a warp takes: what fits registers. */
int tile_rows(int64_t m) { return m <= 1 ? 1 : m <= 4 ? 4 : 16; }
constexpr int warp_rows(int tile, bool normal) { return tile == 16 || (tile == 4 && normal) ? 2 : 4; }

struct Split {
  int splits, chunks_each;
};

Split split_of(const jpq_weight &w, int64_t m) {
  const int64_t chunks = (w.k + CHUNK - 1) / CHUNK, rows = FEW_WARPS * warp_rows(tile_rows(m), w.bits > JPQ_NORMAL);
  const int64_t blocks = (w.n + rows - 1) / rows;
  int64_t splits = blocks ? (WANTED_BLOCKS + blocks - 1) / blocks : 1;
  if (splits > chunks) splits = chunks;
  const int64_t each = (chunks + splits - 1) / splits;
  return {(int)((chunks + each - 1) / each), (int)each};
}

bool few(const jpq_cuda_product &p) {
  return p.path == JPQ_CUDA_FEW || (p.path == JPQ_CUDA_AUTO && p.m <= JPQ_CUDA_FEW_ROWS);
}

size_t parts_bytes(const jpq_weight &w, int64_t m) {
  const Split split = split_of(w, m);
  return split.splits > 1 ? (size_t)split.splits * m * w.n * sizeof(float) : 0;
}

int launched() {
#ifdef __CUDACC__
  return cudaGetLastError() == cudaSuccess ? JPQ_CUDA_OK : JPQ_CUDA_LAUNCH;
#else
  return JPQ_CUDA_OK;
#endif
}

template <int BITS, int M, int ROWS>
int launch_few_tile(const Few &a, dim3 grid, void *stream) {
  constexpr int bytes = few_shared<WIDTH<BITS>, M>();
#ifdef __CUDACC__
  if (bytes > 48 * 1024 &&
      cudaFuncSetAttribute(few_rows<BITS, M, ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched();
#endif
  JPQ_LAUNCH((few_rows<BITS, M, ROWS>), grid, FEW_THREADS, bytes, stream, a);
  return launched();
}

template <int BITS>
int launch_few(const jpq_cuda_product &p) {
  const jpq_weight &w = *p.weight;
  const Split split = split_of(w, p.m);
  const int tile = tile_rows(p.m), rows = FEW_WARPS * warp_rows(tile, NORMAL<BITS>);
  Few a = {weight_of(w), p.x, p.bias, p.y, split.splits > 1 ? (float *)p.workspace : nullptr, p.m, w.n,
           0, split.chunks_each, p.x_type, p.bias_type, p.y_type};
  const dim3 grid((unsigned)((w.n + rows - 1) / rows), (unsigned)split.splits);
  for (int64_t first = 0; first < p.m; first += tile) {
    a.first_row = (int)first;
    const int status = tile == 1   ? launch_few_tile<BITS, 1, 4>(a, grid, p.stream)
                       : tile == 4 ? launch_few_tile<BITS, 4, warp_rows(4, NORMAL<BITS>)>(a, grid, p.stream)
                                   : launch_few_tile<BITS, 16, 2>(a, grid, p.stream);
    if (status) return status;
  }
  if (!a.parts) return JPQ_CUDA_OK;
  const dim3 all((unsigned)((p.m * w.n + 255) / 256));
  JPQ_LAUNCH(add_parts, all, 256, 0, p.stream, a, split.splits);
  return launched();
}

template <int BITS>
int launch_many(const jpq_cuda_product &p) {
  Many a = {weight_of(*p.weight), p.x, p.bias, p.y, p.m, p.x_type, p.bias_type, p.y_type};
  const size_t x_size = p.x_type == JPQ_F16 ? 2 : 4, y_size = p.y_type == JPQ_F16 ? 2 : 4;
  const int64_t most = MOST_GRID_Y * TILE; /* rows of X one grid covers */
  for (int64_t first = 0; first < p.m; first += most) {
    a.m = p.m - first < most ? p.m - first : most;
    a.x = (const char *)p.x + first * p.weight->k * x_size;
    a.y = (char *)p.y + first * p.weight->n * y_size;
    const dim3 grid((unsigned)((p.weight->n + TILE - 1) / TILE), (unsigned)((a.m + TILE - 1) / TILE));
    if (p.x_type == JPQ_F32)
      JPQ_LAUNCH((many_rows<BITS, true>), grid, MANY_THREADS, MANY_SHARED, p.stream, a);
    else
      JPQ_LAUNCH((many_rows<BITS, false>), grid, MANY_THREADS, MANY_SHARED, p.stream, a);
    if (const int status = launched()) return status;
  }
  return JPQ_CUDA_OK;
}

template <int BITS>
int launch(const jpq_cuda_product &p) {
  return few(p) ? launch_few<BITS>(p) : launch_many<BITS>(p);
}

bool is_float(int32_t type) { return type == JPQ_F32 || type == JPQ_F16; }

int check_product(const jpq_cuda_product *p) {
  if (!p) return JPQ_CUDA_BAD_PRODUCT;
  if (const int status = jpq_cuda_check(p->weight)) return status;
  if (p->m < 0 || (p->m && p->weight->n && (!p->x || !p->y))) return JPQ_CUDA_BAD_PRODUCT;
  if (!is_float(p->x_type) || !is_float(p->y_type) || (p->bias && !is_float(p->bias_type))) return JPQ_CUDA_BAD_PRODUCT;
  if (p->path < JPQ_CUDA_AUTO || p->path > JPQ_CUDA_MANY) return JPQ_CUDA_BAD_PRODUCT;
  if (!few(*p)) return JPQ_CUDA_OK;
  const size_t bytes = parts_bytes(*p->weight, p->m);
  return bytes && (!p->workspace || p->workspace_bytes < bytes) ? JPQ_CUDA_WORKSPACE : JPQ_CUDA_OK;
}

}  // namespace

extern "C" int jpq_cuda_check(const jpq_weight *w) {
  if (!w || !w->packed || !w->scales || w->n < 0 || w->k < 1) return JPQ_CUDA_BAD_WEIGHT;
  if (!jpq_is_width(w->bits) || (w->bits > JPQ_NORMAL && w->zeros)) return JPQ_CUDA_BAD_WEIGHT;
  if (w->group_size < 1 || w->k % w->group_size || w->k > INT32_MAX / 8) return JPQ_CUDA_BAD_WEIGHT;
  return w->group_size % UNIT ? JPQ_CUDA_BAD_GROUP : JPQ_CUDA_OK;
}

extern "C" size_t jpq_cuda_matmul_workspace(const jpq_weight *w, int64_t m) {
  size_t most = 0;
  if (!w || w->k < 1 || w->n < 1) return 0;
  for (int64_t rows = 1; rows <= m && rows <= JPQ_CUDA_FEW_ROWS; rows++) {
    const size_t bytes = parts_bytes(*w, rows);
    if (bytes > most) most = bytes;
  }
  return most;
}

extern "C" int jpq_cuda_matmul(const jpq_cuda_product *p) {
  if (const int status = check_product(p)) return status;
  if (!p->m || !p->weight->n) return JPQ_CUDA_OK;
  switch (p->weight->bits) {
    case 1: return launch<1>(*p);
    case 2: return launch<2>(*p);
    case 3: return launch<3>(*p);
    case 4: return launch<4>(*p);
    case 5: return launch<5>(*p);
    case 6: return launch<6>(*p);
    case 7: return launch<7>(*p);
    case 8: return launch<8>(*p);
    case JPQ_NORMAL + 3: return launch<JPQ_NORMAL + 3>(*p);
    case JPQ_NORMAL + 4: return launch<JPQ_NORMAL + 4>(*p);
    case JPQ_NORMAL + 5: return launch<JPQ_NORMAL + 5>(*p);
    case JPQ_NORMAL + 6: return launch<JPQ_NORMAL + 6>(*p);
    default: return launch<JPQ_TERNARY>(*p);
  }
}

extern "C" int jpq_cuda_gather(const jpq_cuda_lookup *p) {
  if (!p) return JPQ_CUDA_BAD_PRODUCT;
  if (const int status = jpq_cuda_check(p->weight)) return status;
  if (p->count < 0 || p->count > INT32_MAX || !is_float(p->out_type)) return JPQ_CUDA_BAD_PRODUCT;
  if (p->index_bytes != 4 && p->index_bytes != 8) return JPQ_CUDA_BAD_PRODUCT;
  if (!p->count) return JPQ_CUDA_OK;
  if (!p->indices || !p->out) return JPQ_CUDA_BAD_PRODUCT;
  const Gather a = {weight_of(*p->weight), p->indices, p->out, p->index_bytes, p->out_type};
  const int64_t parts = (p->weight->k + 4 * GATHER_THREADS - 1) / (4 * GATHER_THREADS);
  const dim3 grid((unsigned)p->count, (unsigned)parts);
  JPQ_LAUNCH(gather_rows, grid, GATHER_THREADS, 0, p->stream, a);
  return launched();
}
