// Sampling without a full sort: thresholds are found from maxima of pieces (top_k) or by narrowing a band of logits by its mass
// (top_p), exactly; sums are kept in double per piece of PIECE ids, in id order.
#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace apportion::APPORTION_ISA {

namespace {

constexpr int PIECE = 64;       // ids that share one maximum and one sum
constexpr int CUTS = 7;         // thresholds tried in one pass over a band
constexpr int SORTED = 128;     // a band so small is sorted
constexpr int PASSES = 16;      // then it is sorted anyhow: what is left are equal logits
constexpr float INF = std::numeric_limits<float>::infinity();

int num_pieces(int n) { return (n + PIECE - 1) / PIECE; }

// Scratch of one row. x and id are the candidates that top_k, or a bound of top_p, left; band: those among which top_p draws its line.
struct Work {
  float *piece_max, *sorted_max, *mass, *x, *band_x, *band_mass;
  int32_t *id, *band_id, *order;
  double* piece_sum;
};

size_t carve(Work* work, std::byte* base, int size) {
  size_t at = 0;
  const auto take = [&](auto*& pointer, size_t count) {
    if (base) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at);
    at += (count * sizeof(*pointer) + 127) / 64 * 64;
  };
  const size_t n = size_t(size) + PIECE;
  take(work->piece_max, num_pieces(size));
  take(work->sorted_max, num_pieces(size));
  take(work->piece_sum, num_pieces(size));
  take(work->mass, n);
  take(work->x, n);
  take(work->id, n);
  take(work->band_x, n);
  take(work->band_mass, n);
  take(work->band_id, n);
  take(work->order, n);
  return at;
}

size_t scratch_bytes(int size) {
  Work work;
  return carve(&work, nullptr, size);
}

// Maxima of the pieces into piece_max; the largest of all, NaN where one logit is NaN, infinite where one is +infinity or all are -infinity.
float find_maximum(const float* x, int n, float* piece_max) {
  V best = set1(-INF), wrong = zero();
  const V inf = set1(INF);
  for (int piece = 0, i = 0; i < n; ++piece, i += PIECE) {
    V top = set1(-INF);
    const int end = std::min(n, i + PIECE);
    int j = i;
    for (; j + WIDTH <= end; j += WIDTH) {
      const V a = load(x + j);
      wrong = wrong + select_less(a, inf, zero(), a);
      top = max(a, top);
    }
    for (; j < end; ++j) {
      if (!(x[j] < INF)) wrong = wrong + set1(x[j]);
      top = max(top, set1(x[j]));
    }
    piece_max[piece] = reduce_max(top);
    best = max(best, top);
  }
  const float bad = reduce_add(wrong);
  return bad == 0.f ? reduce_max(best) : bad;
}

// mass = e^((x - top) * inverse), its sums into piece_sum; returns the total.
double weigh(const float* x, int n, float top, float inverse, float* mass, double* piece_sum) {
  double total = 0;
  const V shift = set1(top), factor = set1(inverse);
  for (int piece = 0, i = 0; i < n; ++piece, i += PIECE) {
    V sum = zero();
    for (int j = i; j < std::min(n, i + PIECE); j += WIDTH) {
      V m = exp((load_n(x + j, n - j) - shift) * factor);
      if (n - j < WIDTH) {
        store(mass + j, m);
        std::fill(mass + n, mass + j + WIDTH, 0.f);
        m = load(mass + j);
      }
      store(mass + j, m);
      sum = sum + m;
    }
    total += piece_sum[piece] = reduce_add(sum);
  }
  return total;
}

// Ids of the k largest of x[n], ties to the lower id, ascending, into work.id; their number.
int select_top(const float* x, int n, int k, Work& work) {
  const int pieces = num_pieces(n);
  float low = -INF;  // at least k elements are not below it: the maxima of k pieces
  if (k < pieces) {
    std::copy(work.piece_max, work.piece_max + pieces, work.sorted_max);
    std::nth_element(work.sorted_max, work.sorted_max + k - 1, work.sorted_max + pieces, std::greater<>());
    low = work.sorted_max[k - 1];
  }
  int count = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    if (work.piece_max[piece] < low) continue;
    for (int i = piece * PIECE; i < std::min(n, (piece + 1) * PIECE); ++i) {
      work.id[count] = i;
      work.x[count] = x[i];
      count += x[i] >= low;
    }
  }
  if (count <= k) return count;  // fewer than k only where n is
  std::copy(work.x, work.x + count, work.band_x);
  std::nth_element(work.band_x, work.band_x + k - 1, work.band_x + count, std::greater<>());
  const float last = work.band_x[k - 1];
  int ties = k - int(std::count_if(work.x, work.x + count, [&](float a) { return a > last; }));
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    const float a = work.x[i];
    if (a < last || (a == last && ties-- <= 0)) continue;
    work.id[kept] = work.id[i];
    work.x[kept++] = a;
  }
  return kept;
}

// Elements of (low, high] of x[n] to `to`, in order; their number. `to` may be where they are. id nullptr: 0, 1, 2, ...
struct Gathered {
  float *x, *mass;
  int32_t* id;
};

int gather(const float* x, const float* mass, const int32_t* id, int n, float low, float high, const Gathered& to) {
  int count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + WIDTH <= n; i += WIDTH) {
    const V a = load(x + i);
    const __mmask16 inside = _mm512_cmp_ps_mask(a, set1(low), _CMP_GT_OQ) & _mm512_cmp_ps_mask(a, set1(high), _CMP_LE_OQ);
    if (!inside) continue;
    const __m512i where = id ? _mm512_loadu_si512(id + i) : _mm512_add_epi32(_mm512_set1_epi32(i), step);
    const V m = load(mass + i);
    store(to.x + count, _mm512_maskz_compress_ps(inside, a));
    store(to.mass + count, _mm512_maskz_compress_ps(inside, m));
    _mm512_storeu_si512(to.id + count, _mm512_maskz_compress_epi32(inside, where));
    count += __builtin_popcount(inside);
  }
#endif
  for (; i < n; ++i) {
    const float a = x[i], m = mass[i];
    const int32_t where = id ? id[i] : i;
    to.x[count] = a;
    to.mass[count] = m;
    to.id[count] = where;
    count += (a > low) & (a <= high);
  }
  return count;
}

// Mass above each of CUTS thresholds.
void mass_above(const float* x, const float* mass, int n, const float* cuts, double* above) {
  std::fill(above, above + CUTS, 0.0);
  for (int start = 0; start < n; start += 4096) {
    V sum[CUTS];
    for (V& s : sum) s = zero();
    const int end = std::min(n, start + 4096);
    for (int i = start; i < end; i += WIDTH) {
      const V a = load_n(x + i, n - i), m = load_n(mass + i, n - i);
      for (int c = 0; c < CUTS; ++c) sum[c] = sum[c] + select_less(set1(cuts[c]), a, m, zero());
    }
    for (int c = 0; c < CUTS; ++c) above[c] += reduce_add(sum[c]);
  }
}

// What no member of the smallest set of mass `wanted` lies below: an element lighter than 1/n of what may be left out is not in it, as
// all of its kind together can be left out.
float nucleus_bound(int n, float top, float temperature, double wanted, double total) {
  const double lightest = std::log(std::max((total - wanted) / n, 1e-300)) - 1e-4;
  const float low = float(top + temperature * lightest - 1e-6 * std::abs(top));
  return low > -FLT_MAX ? low : -FLT_MAX;
}

// The smallest logit of the smallest set of the largest whose mass reaches `wanted`; all of it lies above `low`. Of those equal to
// it, the ids beyond the set lose their mass.
float find_nucleus(const float* x, int n, float low, float top, double wanted, Work& work) {
  float high = top;
  const float *band_x = x, *band_mass = work.mass;
  const int32_t* band_id = nullptr;
  int count = n;
  double above = 0;  // mass above `high`: too little; above `low` there is enough
  for (int pass = 0; pass == 0 || (pass < PASSES && count > SORTED); ++pass) {
    float cuts[CUTS];
    double mass[CUTS];
    for (int c = 0; c < CUTS; ++c) cuts[c] = high - (high - low) * (float(c + 1) / (CUTS + 1));
    mass_above(band_x, band_mass, count, cuts, mass);
    const double before = above;
    for (int c = 0; c < CUTS; ++c) {
      if (before + mass[c] >= wanted) {
        low = cuts[c];
        break;
      }
      above = before + mass[c], high = cuts[c];
    }
    count = gather(band_x, band_mass, band_id, count, low, high, {work.band_x, work.band_mass, work.band_id});
    band_x = work.band_x, band_mass = work.band_mass, band_id = work.band_id;
  }
  int32_t* order = work.order;
  for (int i = 0; i < count; ++i) order[i] = i;
  std::sort(order, order + count, [&](int32_t a, int32_t b) { return band_x[a] != band_x[b] ? band_x[a] > band_x[b] : a < b; });
  int i = 0;
  for (; i < count && above < wanted; ++i) above += band_mass[order[i]];
  const float last = i ? band_x[order[i - 1]] : high;
  for (; i < count && band_x[order[i]] == last; ++i) work.mass[band_id[order[i]]] = 0.f;
  return last;
}

// Take the mass from what is below `last` or lighter than min_p; returns the total of the rest.
double cut_mass(const float* x, int n, float last, float min_p, Work& work) {
  double total = 0;
  for (int piece = 0, i = 0; i < n; ++piece, i += PIECE) {
    V sum = zero();
    for (int j = i; j < std::min(n, i + PIECE); j += WIDTH) {
      V m = select_less(load_n(x + j, n - j), set1(last), zero(), load(work.mass + j));
      m = select_less(m, set1(min_p), zero(), m);
      store(work.mass + j, m);
      sum = sum + m;
    }
    total += work.piece_sum[piece] = reduce_add(sum);
  }
  return total;
}

// The first id whose cumulative mass exceeds `target`.
int pick(int n, double target, const Work& work) {
  double sum = 0;
  int last = 0;
  for (int piece = 0; piece < num_pieces(n); ++piece) {
    if (work.piece_sum[piece] == 0) continue;
    const bool here = sum + work.piece_sum[piece] > target;
    double inside = sum;
    for (int i = piece * PIECE; i < std::min(n, (piece + 1) * PIECE) && (here || piece == num_pieces(n) - 1); ++i) {
      if (work.mass[i] == 0.f) continue;
      last = i;
      inside += work.mass[i];
      if (inside > target) return i;
    }
    if (here) return last;  // the sums in float and in double part by a rounding
    sum += work.piece_sum[piece];
  }
  return last;
}

int32_t sample(const float* logits, int size, const SamplingRow& row, std::byte* scratch) {
  Work work;
  carve(&work, scratch, size);
  const float top = find_maximum(logits, size, work.piece_max);
  if (!std::isfinite(top)) return -1;
  if (row.temperature == 0.f) {
    const int piece = int(std::find(work.piece_max, work.piece_max + num_pieces(size), top) - work.piece_max);
    return int32_t(std::find(logits + piece * PIECE, logits + size, top) - logits);
  }
  const float* x = logits;
  int n = size;
  if (row.top_k > 0 && row.top_k < size) {
    n = select_top(logits, size, row.top_k, work);
    x = work.x;
  }
  double total = weigh(x, n, top, std::min(1.f / row.temperature, FLT_MAX), work.mass, work.piece_sum);
  if (row.top_p < 1.f || row.min_p > 0.f) {
    float last = -FLT_MAX;
    if (row.top_p < 1.f) {
      const double wanted = double(row.top_p) * total;
      const float low = nucleus_bound(n, top, row.temperature, wanted, total);
      if (x == logits) {  // most of a large vocabulary lies below
        n = gather(logits, work.mass, nullptr, n, low, top, {work.x, work.mass, work.id});
        x = work.x;
        std::fill(work.mass + n, work.mass + n + WIDTH, 0.f);  // what the last vector holds beyond them
      }
      last = find_nucleus(x, n, low, top, wanted, work);
    }
    total = cut_mass(x, n, last, row.min_p, work);
  }
  const int chosen = pick(n, row.uniform * total, work);
  return x == logits ? chosen : work.id[chosen];
}

void logprobs(const float* logits, int n, int32_t token, int top_n, float* logprob, int32_t* rank, int32_t* ids, float* values,
              std::byte* scratch) {
  Work work;
  carve(&work, scratch, n);
  const float top = find_maximum(logits, n, work.piece_max);
  if (!std::isfinite(top)) {
    *logprob = std::numeric_limits<float>::quiet_NaN();
    *rank = n;
    for (int i = 0; i < top_n; ++i) ids[i] = i, values[i] = *logprob;
    return;
  }
  const double norm = std::log(weigh(logits, n, top, 1.f, work.mass, work.piece_sum));
  const auto value = [&](float x) { return float(double(x) - top - norm); };
  *logprob = value(logits[token]);
  *rank = 1 + int32_t(std::count_if(logits, logits + n, [&](float a) { return a > logits[token]; }));
  if (top_n <= 0) return;
  const int count = select_top(logits, n, top_n, work);
  std::sort(work.id, work.id + count, [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  for (int i = 0; i < count; ++i) ids[i] = work.id[i], values[i] = value(logits[work.id[i]]);
}

void apply_bitmask(float* x, int n, const uint8_t* bits) {
  for (int i = 0; i < n; i += 8) {
    const unsigned allowed = bits[i / 8];
    const int end = std::min(n, i + 8);
    if (allowed == 0) std::fill(x + i, x + end, -INF);
    else if (allowed != 0xff)
      for (int j = i; j < end; ++j)
        if (!(allowed >> (j - i) & 1)) x[j] = -INF;
  }
}

}  // namespace

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {.sample = sample, .logprobs = logprobs, .apply_bitmask = apply_bitmask, .scratch_bytes = scratch_bytes};

}  // namespace apportion::APPORTION_ISA
