// From the compact tables in global memory to the replicated ones in shared memory.

constexpr int TABLE_ROWS_PER_THREAD = N_TABLE_ROWS ? (N_TABLE_ROWS + N_THREADS - 1) / N_THREADS : 1;

// Rows of the compact tables that this thread will spread, on their way from global memory.
struct TableRows { uint2 row[TABLE_ROWS_PER_THREAD]; };

static __device__ __forceinline__ TableRows load_tables(const Params& p) {
  TableRows rows;
#pragma unroll
  for (int k = 0; k < TABLE_ROWS_PER_THREAD; ++k) {
    const int row = threadIdx.x + k * N_THREADS;
    if (row < N_TABLE_ROWS) rows.row[k] = __ldg(p.tables + row);
  }
  return rows;
}

// Each row REPLICAS times, two copies per store. Eight neighbouring threads begin at different copies:
// their stores share no bank.
static __device__ __forceinline__ void store_tables(const TableRows& rows) {
#pragma unroll
  for (int k = 0; k < TABLE_ROWS_PER_THREAD; ++k) {
    const int row = threadIdx.x + k * N_THREADS;
    if (row >= N_TABLE_ROWS) continue;
    int table = 0;
#pragma unroll
    for (int i = 1; i < N_TABLES; ++i) table = row >= TABLE_FIRST_ROW[i] ? i : table;
    u8* target = shared_memory + TABLE_OFFSET[table] + (row - TABLE_FIRST_ROW[table]) * 256;
    const uint4 twice = make_uint4(rows.row[k].x, rows.row[k].y, rows.row[k].x, rows.row[k].y);
#pragma unroll
    for (int copy = 0; copy < REPLICAS / 2; ++copy) {
      const int place = (copy + threadIdx.x) % (REPLICAS / 2);
      uint4 entries = twice;
#if TABLE_HEADS
      // Lanes that take the second half of a block first find the halves of these tables swapped.
      if (TABLE_TURNED[table] && place >= REPLICAS / 4) entries = make_uint4(twice.y, twice.x, twice.y, twice.x);
#endif
      *reinterpret_cast<uint4*>(target + place * 16) = entries;
    }
  }
}
