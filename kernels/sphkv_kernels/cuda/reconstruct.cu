// Launch of the reconstruction baseline (reconstruct.cuh): a persistent grid over the plan's segments.

extern "C" __global__ void __launch_bounds__(N_THREADS, 1) KERNEL_NAME(const __grid_constant__ Params p) {
  u32 base;
  asm("mov.u32 %0, shared_memory;" : "=r"(base));
  if (base != SHARED_BASE) __trap();
  const Lane lane = lane_of_thread();
  store_tables(load_tables(p));
  __syncthreads();
  const int* head = p.heads + blockIdx.x * HEAD_INTS;
  int next = head[8];
  Segment segment = {head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]};
  while (true) {
    reconstruct_tier(p, segment, lane, threadIdx.x / 32);
    if (next >= head[9]) break;
    const int* words = p.segments + next++ * SEGMENT_INTS;
    segment = {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
  }
}
