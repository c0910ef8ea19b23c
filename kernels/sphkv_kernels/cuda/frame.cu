// A decode step's vectors into the frame and its outputs out of it: rows times small float32 matrices.
//
//   q' = q M_h   offset = q . c_h   (a, b) = q W_h   k' = (k - c_h - R_t mu_h) K_h   v' = v S   o = o' S^T
//
// A block has the columns of one head's matrix, 64 at a time, and ROWS vectors of that head, one a sequence.
// Four threads share a column, a quarter of the sum each. What matters is latency: the matrix is asked for
// before the vectors are known.

constexpr int N_COLUMNS = 64, N_SLICES = 4, SLICE = HEAD_DIM / N_SLICES;
static_assert(N_THREADS == N_COLUMNS * N_SLICES && HEAD_DIM % N_COLUMNS == 0, "a thread has one column");

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

// Vectors are rows, matrices (from, to): y = x M.
struct FrameParams {
  const void* query;            // (n_sequences, n_q_heads, HEAD_DIM) of `type`, strided but in the last dimension
  const void* key;              // (n_sequences, n_kv_heads, HEAD_DIM) likewise
  const void* value;            // as key
  const float* query_matrix;    // M: (n_q_heads or 1, HEAD_DIM, HEAD_DIM)
  const float* key_matrix;      // K: (n_kv_heads or 1, HEAD_DIM, HEAD_DIM)
  const float* value_matrix;    // S: (HEAD_DIM, HEAD_DIM)
  const float* centre;          // c: (n_kv_heads, HEAD_DIM) or null
  const float* mean;            // mu: (n_kv_heads, HEAD_DIM) or null; R_t mu = cosine * mean + sine * turned
  const float* turned;          // as mean
  const float* cosine;          // of a sequence's position: (n_sequences, HEAD_DIM) or null
  const float* sine;            // as cosine
  const float* position;        // W: (n_q_heads, HEAD_DIM, n_term_columns) or null
  const float* offset;          // c, for every query head: (n_q_heads, HEAD_DIM) or null
  float* framed;                // q': (n_sequences, n_q_heads, HEAD_DIM)
  float* coefficients;          // (a, b): (n_sequences, n_q_heads, n_term_columns) or null
  float* offsets;               // (n_sequences, n_q_heads) or null
  u16* tail;                    // k', v' in bf16: rows of HEAD_DIM, of keys and values alike
  const long long* rows;        // (2, n_sequences, n_kv_heads): which of them, for keys, then for values
  long long sequence_stride[3]; // of query, key, value, in elements
  long long head_stride[3];
  int query_matrix_stride;      // elements from one head's matrix to the next: 0 where heads share one
  int key_matrix_stride;
  int n_sequences;
  int n_q_heads;
  int n_kv_heads;
  int n_term_columns;           // 2 * RoPE pairs of the position term, 0 without one
  int n_chunks;                 // of N_COLUMNS: a query's columns, which are HEAD_DIM, the term's and the offset's
  int type;                     // of query, key, value: a `Type`
};

struct UnframeParams {
  const float* source;          // o': (n_rows, HEAD_DIM)
  const float* matrix;          // S^T: (HEAD_DIM, HEAD_DIM)
  void* target;                 // o: (n_rows, HEAD_DIM) of `type`
  int n_rows;                   // n_sequences * n_q_heads
  int type;                     // a `Type`
};

static __device__ __forceinline__ float load_as_float(const void* source, long long element, int type) {
  if (type == FLOAT32) return static_cast<const float*>(source)[element];
  const u32 bits = static_cast<const u16*>(source)[element];
  return type == BFLOAT16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

static __device__ __forceinline__ u16 to_bfloat16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

static __device__ __forceinline__ void store_as(void* target, long long element, float x, int type) {
  if (type == FLOAT32) static_cast<float*>(target)[element] = x;
  else static_cast<u16*>(target)[element] = type == BFLOAT16 ? to_bfloat16(x) : u16(pack_half2(x, 0.f));
}

// store(row, column of the block, sum over k of load(row, k) * column[k * stride]) for the rows below n_rows.
// column: the thread's own, null where there is none.
template <class Load, class Store>
static __device__ __forceinline__ void rows_times_columns(const float* column, int stride, int n_rows, Load load,
                                                          Store store) {
  __shared__ __align__(16) float vectors[ROWS][HEAD_DIM];
  __shared__ float partial[N_SLICES][ROWS][N_COLUMNS];
  const int slice = threadIdx.x / N_COLUMNS, first = slice * SLICE;
  float entries[SLICE];
#pragma unroll
  for (int k = 0; k < SLICE; ++k) entries[k] = column ? column[(first + k) * stride] : 0.f;
  for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += N_THREADS) {
    const int row = i / HEAD_DIM, k = i % HEAD_DIM;
    vectors[row][k] = row < n_rows ? load(row, k) : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < SLICE; ++k) sum += vectors[row][first + k] * entries[k];
    partial[slice][row][threadIdx.x % N_COLUMNS] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * N_COLUMNS; i += N_THREADS) {
    const int row = i / N_COLUMNS, c = i % N_COLUMNS;
    if (row < n_rows)
      store(row, c, (partial[0][row][c] + partial[1][row][c]) + (partial[2][row][c] + partial[3][row][c]));
  }
}

// Blocks: (query heads, key heads, value heads) x chunks of columns; ROWS sequences each.
extern "C" __global__ void __launch_bounds__(N_THREADS, 1) frame_tokens(const __grid_constant__ FrameParams p) {
  const int slot = blockIdx.x / p.n_chunks, start = blockIdx.x % p.n_chunks * N_COLUMNS;
  const int kind = slot < p.n_q_heads ? 0 : slot < p.n_q_heads + p.n_kv_heads ? 1 : 2;
  const int head = kind == 0 ? slot : (slot - p.n_q_heads) % p.n_kv_heads;
  if (kind != 0 && start >= HEAD_DIM) return;
  const int first_row = blockIdx.y * ROWS, n_rows = min(ROWS, p.n_sequences - first_row);
  const void* source = kind == 0 ? p.query : kind == 1 ? p.key : p.value;
  const float* matrix = kind == 0   ? p.query_matrix + (long long)head * p.query_matrix_stride
                        : kind == 1 ? p.key_matrix + (long long)head * p.key_matrix_stride
                                    : p.value_matrix;
  // Beyond the matrix a query has the columns of its position term, then that of its offset.
  const int c = start + threadIdx.x % N_COLUMNS, beyond = c - HEAD_DIM;
  const float* column = matrix + c;
  int stride = HEAD_DIM;
  if (beyond >= 0) {
    column = nullptr;
    if (beyond < p.n_term_columns) {
      stride = p.n_term_columns;
      column = p.position + (long long)head * HEAD_DIM * stride + beyond;
    } else if (beyond == p.n_term_columns && p.offset != nullptr) {
      stride = 1;
      column = p.offset + head * HEAD_DIM;
    }
  }
  auto load = [&](int row, int k) {
    const int s = first_row + row, at = head * HEAD_DIM + k;
    float x = load_as_float(source, s * p.sequence_stride[kind] + head * p.head_stride[kind] + k, p.type);
    if (kind == 1) {
      if (p.centre != nullptr) x -= p.centre[at];
      if (p.mean != nullptr)
        x -= p.cosine[s * HEAD_DIM + k] * p.mean[at] + p.sine[s * HEAD_DIM + k] * p.turned[at];
    }
    return x;
  };
  auto store = [&](int row, int of_block, float x) {
    const int s = first_row + row, at = start + of_block, after = at - HEAD_DIM;
    if (kind != 0) {
      const long long where = p.rows[((kind - 1) * p.n_sequences + s) * p.n_kv_heads + head];
      p.tail[where * HEAD_DIM + at] = to_bfloat16(x);
      return;
    }
    const long long asked = (long long)s * p.n_q_heads + head;
    if (after < 0) p.framed[asked * HEAD_DIM + at] = x;
    else if (after < p.n_term_columns) p.coefficients[asked * p.n_term_columns + after] = x;
    else if (after == p.n_term_columns && p.offset != nullptr) p.offsets[asked] = x;
  };
  rows_times_columns(column, stride, n_rows, load, store);
}

// Blocks: chunks of columns, ROWS vectors each.
extern "C" __global__ void __launch_bounds__(N_THREADS, 1) unframe_outputs(const __grid_constant__ UnframeParams p) {
  const int start = blockIdx.x * N_COLUMNS, first_row = blockIdx.y * ROWS;
  auto load = [&](int row, int k) { return p.source[(long long)(first_row + row) * HEAD_DIM + k]; };
  auto store = [&](int row, int c, float x) {
    store_as(p.target, (long long)(first_row + row) * HEAD_DIM + start + c, x, p.type);
  };
  rows_times_columns(p.matrix + start + threadIdx.x % N_COLUMNS, HEAD_DIM, min(ROWS, p.n_rows - first_row), load,
                     store);
}
