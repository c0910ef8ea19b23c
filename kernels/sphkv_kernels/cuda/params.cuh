// What a launch is given: device pointers and scalars (kernel_structs.py). decode.launch_params fills in all
// but the results (output and log_sum_exp, or logits and tail_logits), scale_log2 and softcap_*: its callers do.

struct Params {
  const u8* pool;
  const uint2* records;     // per page: (byte offset / 16, live tokens)
  const int* entries;       // per page: its entry in the page table (logits, window)
  const int* first_positions;  // per page: its lowest position, or null
  const u8* position_offsets;  // per page, OFFSET_BYTES a token: how far after that, in the order of norms
  const int* heads;         // per block HEAD_INTS: its first segment, the range of the others, its second
                            // tier with tables (-1: none), pages
  const int* segments;      // SEGMENT_INTS per further segment: the segment, pages
  const uint2* tables;      // compact table rows, one after the other
  const void* query;        // (n_sequences, n_q_heads, head_dim)
  const float* offset;      // (n_sequences, n_q_heads) or null: added to every logit
  const u8* tail_keys;      // (n_sequences, n_kv_heads, tail_capacity, head_dim) bf16 or null
  const u8* tail_values;
  const int* tail_tokens;   // (n_sequences)
  const u8* positions;      // (n_entries, page_size) of POSITION_BYTES each, or null (window)
  const int* tail_positions;
  const int* query_positions;
  const float* position_coefficients;  // (n_sequences, n_q_heads, 2, n_position_pairs) or null
  const float* position_frequencies;   // (n_kv_heads, n_position_pairs) radians per token
  float* output;            // (n_sequences, n_q_heads, head_dim)
  float* log_sum_exp;       // (n_sequences, n_q_heads)
  float* logits;            // (n_entries, group_size, page_size); reconstruct.cuh writes dense keys here
  float* tail_logits;       // (n_sequences, n_q_heads, tail_capacity); there, dense values
  float4* partial_output;   // per part: GROUP_TILES * COLUMNS * 8 * 32 float4, fragment order
  float* partial_state;     // per part: m, l of 8 * GROUP_TILES heads
  int* arrivals;            // per (sequence, KV head): zero before and after every launch
  float scale_log2;         // softmax_scale * log2(e)
  float softcap_log2;       // softcap * log2(e)
  float softcap_inverse;    // 2 / softcap: y * this = log2(e^(2 s / cap))
  int n_kv_heads;
  int group_size;
  int page_units_log2;      // page_size = 16 << this
  int tail_capacity;
  int query_type;           // 0 float32, 1 bfloat16, 2 float16
  int window;
  int n_position_pairs;
};

// One segment: pages of one tier of one (sequence, KV head), worked on by one block.
struct Segment {
  int row;          // sequence * n_kv_heads + kv_head
  int tier;
  int first_page;   // into records
  int n_pages;
  int flags;        // FIRST: load q, reset; LAST: emit; TAIL: attend the tail too
  int part;         // this block's part of the row
  int n_parts;      // parts of the row
  int part_base;    // first part of the row among all partial results
};
// With both goes where the first FIRST_PAGES pages lie (byte offset / 16), the last one repeated.
constexpr int SEGMENT_INTS = sizeof(Segment) / 4 + FIRST_PAGES, HEAD_INTS = SEGMENT_INTS + 4;
constexpr int FIRST = 1, LAST = 2, TAIL = 4;
