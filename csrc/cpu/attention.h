// Paged attention on the CPU: what a step is (plan), and the functions one instruction set supplies.
//
// A row is one query head at one position. The rows of a request that share a kv head are numbered position by position, head by
// head (row = position * group + head), and cut into tiles of at most ROWS, so that a tile reads K and V once for all its rows.
//
// What a row computes depends on its absolute position alone: the context is walked in chunks of CHUNK absolute tokens within
// partitions of PARTITION absolute tokens. A partition has its own running maximum; partitions are merged in order. A chunk or a
// partition that a row cannot see leaves the row's state exactly as it was, so neither the tile a row falls into nor whether its
// tokens came as prefill or decode can change a bit of its result.
//
// Where a head has a unified maximum (RunCall::phi) a partition takes it for its running one, so that nothing is scaled again and
// partitions add up (FlashDecoding++, arXiv:2311.01282, section 3). A row whose sum leaves [2^-RANGE, 2^RANGE] is computed again.
//
// V must not hold NaN beyond the context, as 0 * NaN is NaN: `write` clears a SPAN of V before its first token.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace apportion {

class ThreadTeam;

namespace attention {

constexpr int SUB = 16;          // tokens of the unit in which a chunk is loaded or skipped
constexpr int SPAN = 32;         // aligned tokens that one item of `write` owns; block sizes are multiples of it
constexpr int CHUNK = 64;        // tokens between two updates of the running maximum
constexpr int PARTITION = 1024;  // kernels/ops.PARTITION_LEN
constexpr int ROWS = 32;         // rows of a tile
constexpr int RANGE = 60;        // powers of two about the unified maximum: what float32 loses below is 2^-66 of a sum

enum class Format { FP32, BF16, FP16, E4M3, E5M2 };
constexpr int NUM_FORMATS = 5;

// One layer group (kernels/ops.AttentionSpec).
struct Shape {
  int num_heads, num_kv_heads, head_dim, v_head_dim, block_size;
  int window;  // 0: none
  bool latent;
  Format format;
  float scale;
  int rotary_dim;
  bool interleaved;
  float qk_norm_eps;

  int lanes() const { return format == Format::FP32 ? 1 : format >= Format::E4M3 ? 4 : 2; }
  float unit() const { return format == Format::E4M3 ? 256.f : 1.f; }  // what unpacked numbers are to be multiplied by
  int group() const { return num_heads / num_kv_heads; }
  int64_t k_head_bytes() const { return int64_t(head_dim) / lanes() * block_size * 4; }
  int64_t v_head_bytes() const { return int64_t(block_size) / lanes() * v_width() * 4; }
  int v_width() const { return latent ? head_dim : v_head_dim; }  // dwords of a V row
  int64_t v_offset() const { return latent ? 0 : num_kv_heads * k_head_bytes(); }
};

// Up to SPAN new tokens of one request inside one aligned span of a block.
struct WriteItem {
  int row;    // first token in the flat batch
  int count;
  int slot;   // first token's place in the block
  int64_t block_bytes;
};

// A tile, kv heads and a range of partitions. Small tiles (decode) take several kv heads, which lie next to one another in a block:
// memory is read faster in long pieces.
struct Item {
  int request, kv_head, num_heads, first_row, num_rows, first_partition, last_partition;
  int merge;  // index of the Merge that gathers its partitions, -1: the item is a whole tile and writes the output itself

  int rows() const { return num_heads * num_rows; }  // head by head; at most ROWS
};

// A tile whose partitions were dealt to several items. The item that ends last merges them, in order.
struct Merge {
  int items;
  int first_partition, num_partitions;
  int64_t partials;  // floats from the start of the workspace; partition-major, `partial_floats` a row
};

struct Plan {
  const int32_t* query_start_loc = nullptr;
  const int32_t* seq_lens = nullptr;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int64_t write_work = 0, run_work = 0;  // elements moved, multiply-adds
  std::vector<WriteItem> writes;
  std::vector<Item> items;
  std::vector<Merge> merges;
  std::vector<int> pending;  // items still to end, per merge; counted down atomically
  int64_t workspace_floats = 0;

  // Empty, its memory kept for the next step.
  void clear() {
    writes.clear(), items.clear(), merges.clear(), pending.clear();
    write_work = run_work = workspace_floats = 0;
  }
};

// Storage of one row of a partition or a total: Dv accumulators, then the maximum, then the sum.
inline int padded(int width) { return (width + 15) / 16 * 16; }
inline int partial_floats(const Shape& shape) { return padded(shape.v_head_dim) + 16; }

struct WriteCall {
  const Shape* shape;
  std::byte* layer;  // arena + layer_offset
  float* qkv;        // or the latent rows
  int64_t stride;    // floats between tokens
  const int32_t* positions;
  const float* cos_sin;
  const float* q_norm;
  const float* k_norm;
  const float* scales;  // of keys, then of values, one a kv head; null: 1
};

struct RunCall {
  const Shape* shape;
  const std::byte* layer;
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  const Plan* plan;
  float* workspace;
  const float* scales;  // as in WriteCall
  const float* phi;     // [num_heads] or null: each head's unified maximum, of scores without their scale; NaN: it has none
};

using RowMask = uint32_t;  // rows of an item
static_assert(ROWS == 32);

// What one instruction set supplies, per format.
struct Kernels {
  using Write = void (*)(const WriteCall&, const WriteItem&, std::byte* scratch);
  // Write those of `rows` whose sums stayed in range; return the others.
  using Run = RowMask (*)(const RunCall&, const Item&, RowMask rows, std::byte* scratch);
  Write write[NUM_FORMATS];
  Write write_latent[NUM_FORMATS];
  Run run[NUM_FORMATS];
  Run run_latent[NUM_FORMATS];
  RowMask (*merge)(const RunCall&, const Item&, const Merge&, std::byte* scratch);  // as Run
  void (*rotate)(float* x, int64_t row_stride, int64_t head_stride, int rows, int heads, int rotary_dim, const int32_t* positions,
                 const float* cos_sin, bool interleaved);
  size_t (*scratch_bytes)(const Shape&);  // of one thread
};

// One layer group bound to an arena. The table of the instruction set chosen when it was made is kept.
class PagedAttention {
 public:
  PagedAttention(ThreadTeam& team, const Shape& shape, std::byte* arena);
  ThreadTeam& team() const { return team_; }
  void plan(Plan& plan, int num_requests) const;
  void write(Plan& plan, int64_t layer_offset, float* qkv, int64_t stride, const int32_t* positions, const float* cos_sin, const float* q_norm,
             const float* k_norm, const float* scales) const;
  void run(Plan& plan, int64_t layer_offset, const float* q, int64_t q_stride, float* out, int64_t out_stride, const float* scales,
           const float* phi);
  int64_t recomputed() const { return recomputed_.load(std::memory_order_relaxed); }  // rows that left the range, ever

 private:
  ThreadTeam& team_;
  Shape shape_;
  std::byte* arena_;
  const Kernels& kernels_;
  std::atomic<int64_t> recomputed_ = 0;
};

}  // namespace attention
}  // namespace apportion
