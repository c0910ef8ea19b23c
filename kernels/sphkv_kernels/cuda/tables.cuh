// From the compact tables in global memory to the replicated ones in shared memory.

// A row REPLICAS times, two copies per store. Neighbouring threads begin at different copies: of 16 copies
// eight threads do, whose stores then share no bank.
static __device__ __forceinline__ void store_row(u8* target, uint2 row, bool turned, u32 thread) {
  const uint4 twice = make_uint4(row.x, row.y, row.x, row.y);
#pragma unroll
  for (int copy = 0; copy < REPLICAS / 2; ++copy) {
    const int place = (copy + thread) % (REPLICAS / 2);
    uint4 entries = twice;
#if TABLE_HEADS
    // Lanes that take the second half of a block first find the halves of these tables swapped.
    if (turned && place >= REPLICAS / 4) entries = make_uint4(twice.y, twice.x, twice.y, twice.x);
#endif
    *reinterpret_cast<uint4*>(target + place * 16) = entries;
  }
}

#if TABLE_SETS
// The tables of a tier are a set; sets take turns where they lie in the same places.

// Compact rows of a set, and which others it overwrites, a bit each.
struct SetRows { int first, n; u32 overwritten; };

static __device__ __forceinline__ SetRows set_of(int tier) {
  SetRows found = {0, 0, 0u};
#pragma unroll
  for (int i = 0; i < TABLE_SETS; ++i)
    if (tier == i) found = {SET_FIRST_ROW[i], SET_ROWS[i], SETS_OVERWRITTEN[i]};
  return found;
}

static __device__ __forceinline__ u32 bit_of(int tier) { return tier < 0 ? 0u : 1u << tier; }

// All compact rows and their places into L2, by the blocks together.
static __device__ __forceinline__ void prefetch_tables(const Params& p) {
  const int line = blockIdx.x + gridDim.x * threadIdx.x;
  if (line * 128 < TABLE_BYTES) prefetch_line(reinterpret_cast<const u8*>(p.tables) + line * 128);
}

// The sets that are there, a bit each: in shared memory, registers are scarce where tiers are many.
static __device__ __forceinline__ u32* present_sets() {
  return reinterpret_cast<u32*>(shared_memory + PRESENT_OFFSET);
}

// Brings in the tables of `tier`, and of `also` where both have room (-1: none), beside or in the place of
// those `present`; between barriers. AT_ONCE rows a thread: in the loop over segments one, or what is kept
// over it spills.
template <int AT_ONCE>
static __device__ __forceinline__ void bring_tables(const Params& p, u32 present, int tier, int also) {
  const SetRows own = set_of(tier);
  SetRows other = set_of(also);
  if (own.overwritten & bit_of(also)) {
    also = -1;
    other = {0, 0, 0u};
  }
  u32 thread;  // read here, so that nothing that follows from it is kept either
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const u32* places = reinterpret_cast<const u32*>(p.tables + PLACES_ROW);
  const int n = own.n + other.n;
#pragma unroll 1
  for (int start = int(thread); start < n; start += AT_ONCE * N_THREADS) {
    uint2 row[AT_ONCE];
    u32 place[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const int i = start + k * N_THREADS, number = i < own.n ? own.first + i : other.first + i - own.n;
      if (i < n) {
        row[k] = __ldg(p.tables + number);
        place[k] = __ldg(places + number);
      }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
      if (start + k * N_THREADS < n) store_row(shared_memory + place[k], row[k], false, thread);
  }
  if (thread == 0)
    *present_sets() = (present & ~(own.overwritten | other.overwritten)) | bit_of(tier) | bit_of(also);
}
#endif

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

static __device__ __forceinline__ void store_tables(const TableRows& rows) {
#pragma unroll
  for (int k = 0; k < TABLE_ROWS_PER_THREAD; ++k) {
    const int row = threadIdx.x + k * N_THREADS;
    if (row >= N_TABLE_ROWS) continue;
    int table = 0;
#pragma unroll
    for (int i = 1; i < N_TABLES; ++i) table = row >= TABLE_FIRST_ROW[i] ? i : table;
    u8* target = shared_memory + TABLE_OFFSET[table] + (row - TABLE_FIRST_ROW[table]) * 256;
    store_row(target, rows.row[k], TABLE_TURNED[table], threadIdx.x);
  }
}
