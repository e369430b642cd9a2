// The kernels of an update. Each works through a table of jobs, boxes of at most 128 x 128 elements:
// `quantize` and `copy` those that lie evenly, `evaluate` those of any expression. Apart they need
// few enough registers. The structs mirror src/backend/cuda/jobs.rs, the numerics src/fp8.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Kind : u8 { COPY, QUANTIZE, MAXIMUM, EVALUATE, SCAN };
enum Type : u8 { F32, BF16, F16, E4M3, E8M0, I32, U8 };
enum Recipe : u8 { VLLM, DEEPGEMM, PRIME_RL, UE8M0 };
enum Mode : u8 { VALUES, TILE, AMAX };
enum What : u32 { RAW_LOAD, RAW_FILL, LOAD, FILL, LOAD_MULTIPLY, ROUND, MULTIPLY, PUSH, ADD };

struct alignas(16) Job {
  u64 src, dst, aux;
  u32 src_row, dst_row, unit;
  u16 rows, cols;
  u8 kind, dtype, recipe, scales;
  u32 pad;
};

struct Evaluation {
  u64 dst, scale, amax;
  i64 dst_row, dst_col, scale_row, scale_col;
  u32 unit, segments, segment_count;
  u16 rows, cols;
  u16 store_row, store_col, store_rows, store_cols;
  u16 scale_rows, scale_cols;
  u8 mode, dtype, scales, step_count;
  u8 recipe[4], between[4];
};

struct Segment {
  u32 ops, op_count, operands, flags;
  u16 row, col, rows, cols;
};
const u32 BY_COLUMN = 1, WATCHED = 2, RAW = 4, NOT_CONSTANT = 8;

struct Operand {
  u64 address;
  i64 row, col;
  u32 phase_row, phase_col, step, block;
  u32 dtype, pad;
};

struct Op {
  u32 what, arg;
};

struct Header {
  u64 jobs, evaluations, segments, operands, ops;
  u32 count, pad;
};

const u32 INFINITY_BITS = 0x7f800000u;
const u32 NAN_BITS = 0x7fffffffu;
const int THREADS = 256;
const int BATCH = 4;

__device__ __forceinline__ float bits_f32(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 f32_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ bool is_nan(float x) { return (f32_bits(x) & NAN_BITS) > INFINITY_BITS; }
__device__ __forceinline__ bool finite(float x) { return (f32_bits(x) & NAN_BITS) < INFINITY_BITS; }

// Quotients of small numbers: the product errs by less than half a step below 2^21.
struct Divider {
  u32 by;
  float inverse;
  __device__ __forceinline__ explicit Divider(u32 by) : by(by), inverse(1.0f / by) {}
  __device__ __forceinline__ u32 of(u32 x) const { return __float2uint_rd((x + 0.5f) * inverse); }
  __device__ __forceinline__ u32 rest(u32 x, u32 quotient) const { return x - quotient * by; }
};

// ---- codecs: src/fp8/codec.rs ----

__device__ __forceinline__ u32 encode_e4m3_one(float x) {
  if (is_nan(x)) return 0x7f;
  u32 sign = f32_bits(x) >> 24 & 0x80;
  float magnitude = fminf(fabsf(x), 448.0f);
  if (magnitude < 0.015625f) {
    return sign | (f32_bits(__fadd_rn(magnitude, 16384.0f)) - f32_bits(16384.0f));
  }
  u32 bits = f32_bits(magnitude);
  return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960);
}

// Two codes, that of `low` in the low byte.
__device__ __forceinline__ u32 encode_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return encode_e4m3_one(low) | encode_e4m3_one(high) << 8;
#endif
}

__device__ __forceinline__ float decode_e4m3(u32 code) {
  u32 sign = (code & 0x80) << 24, magnitude = code & 0x7f;
  if (magnitude == 0x7f) return bits_f32(sign | NAN_BITS);
  if (magnitude >= 8) return bits_f32(sign | (magnitude + 960) << 20);
  return bits_f32(sign | f32_bits((float)magnitude * 0.001953125f));
}

__device__ __forceinline__ u32 encode_e8m0(float x) {
  u32 bits = f32_bits(x) & NAN_BITS;
  if (bits >= INFINITY_BITS) return 255;
  if (bits <= 0x00400000u) return 0;
  u32 exponent = (bits >> 23) + ((bits & 0x007fffffu) != 0);
  return exponent < 254 ? exponent : 254;
}

__device__ __forceinline__ float decode_e8m0(u32 byte) {
  return bits_f32(byte == 0 ? 0x00400000u : byte == 255 ? NAN_BITS : byte << 23);
}

__device__ __forceinline__ u32 encode_bf16(float x) {
  u32 bits = f32_bits(x);
  return is_nan(x) ? 0x7fc0u : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ __forceinline__ u32 encode_f16(float x) {
  if (is_nan(x)) return (f32_bits(x) >> 16 & 0x8000) | 0x7e00;
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}

__device__ __forceinline__ float decode_f16(u32 half) {
  if ((half & 0x7fff) > 0x7c00) {
    return bits_f32((half & 0x8000) << 16 | 0x7fc00000u | (half & 0x3ff) << 13);
  }
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)half));
  return x;
}

__device__ __forceinline__ u32 size_of(u32 dtype) {
  return dtype == F32 || dtype == I32 ? 4 : dtype == BF16 || dtype == F16 ? 2 : 1;
}

__device__ __forceinline__ float decode(u32 dtype, u32 bits) {
  switch (dtype) {
    case BF16: return bits_f32(bits << 16);
    case F16: return decode_f16(bits);
    case E4M3: return decode_e4m3(bits);
    case E8M0: return decode_e8m0(bits);
    default: return bits_f32(bits);
  }
}

__device__ __forceinline__ u32 encode(u32 dtype, float x) {
  switch (dtype) {
    case BF16: return encode_bf16(x);
    case F16: return encode_f16(x);
    case E8M0: return encode_e8m0(x);
    default: return f32_bits(x);
  }
}

__device__ __forceinline__ float rounded(u32 dtype, float x) {
  return dtype == F32 ? x : decode(dtype, encode(dtype, x));
}

// True if the bits of an element are those of NaN or infinity.
__device__ __forceinline__ bool bad_bits(u32 dtype, u32 bits) {
  switch (dtype) {
    case F32: return (bits & NAN_BITS) >= INFINITY_BITS;
    case BF16: return (bits & 0x7fff) >= 0x7f80;
    case F16: return (bits & 0x7fff) >= 0x7c00;
    case E4M3: return (bits & 0x7f) == 0x7f;
    case E8M0: return bits == 0xff;
    default: return false;
  }
}

// ---- recipes: src/fp8/recipe.rs ----

__device__ __forceinline__ float scale_of(u32 recipe, u32 amax_bits) {
  const float inverse = bits_f32(0x3b124925u);
  if (recipe == UE8M0) {
    if (amax_bits >= INFINITY_BITS) return bits_f32(254u << 23);
    u32 bits = f32_bits(__fmul_rn(fmaxf(bits_f32(amax_bits), 1e-4f), inverse));
    u32 exponent = (bits >> 23) + ((bits & 0x007fffffu) != 0);
    return bits_f32((exponent < 1 ? 1 : exponent > 254 ? 254 : exponent) << 23);
  }
  if (amax_bits > INFINITY_BITS) return bits_f32(NAN_BITS);
  float amax = bits_f32(amax_bits);
  if (recipe == PRIME_RL) return fmaxf(__fmul_rn(amax, inverse), 1e-12f);
  return __fmul_rn(fmaxf(amax, 1e-4f), inverse);
}

// What elements are multiplied with, or the scale itself where they are divided.
__device__ __forceinline__ float step_of(u32 recipe, float scale) {
  if (recipe == PRIME_RL) return scale;
  if (recipe == VLLM) {
    float inverse;
    asm("div.full.f32 %0, %1, %2;" : "=f"(inverse) : "f"(1.0f), "f"(scale));
    return inverse;
  }
  return __fdiv_rn(1.0f, scale);
}

__device__ __forceinline__ float apply(bool divide, float x, float step) {
  return divide ? __fdiv_rn(x, step) : __fmul_rn(x, step);
}

__device__ __forceinline__ void store_scale(u64 address, u32 format, float scale) {
  if (format == E8M0) *(u8*)address = encode_e8m0(scale);
  else *(float*)address = scale;
}

// The largest of all threads' values, to all of them. Two sets of words take turns, so that one
// barrier is enough: a thread that comes round to a set again has passed the barrier of the other.
__device__ __forceinline__ u32 block_max(u32 value, u32& turn) {
  __shared__ alignas(16) u32 parts[2][THREADS / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  u32* own = parts[turn & 1];
  turn++;
  if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = value;
  __syncthreads();
  const uint4 low = ((const uint4*)own)[0], high = ((const uint4*)own)[1];
  return max(max(max(low.x, low.y), max(low.z, low.w)), max(max(high.x, high.y), max(high.z, high.w)));
}

__device__ __forceinline__ void mark(u32* bad, u32 unit) { *(volatile u32*)(bad + unit) = 1; }

// What is read or written once stays out of the way of what is not.
__device__ __forceinline__ uint4 load_once(u64 address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// The larger of each half.
__device__ __forceinline__ u32 max_pair(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 m;
  asm("max.u16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
#else
  return __vmaxu2(a, b);
#endif
}

__device__ __forceinline__ u32 absolute_max(u32 sofar, const uint4& v) {
  sofar = max_pair(sofar, v.x & 0x7fff7fffu);
  sofar = max_pair(sofar, v.y & 0x7fff7fffu);
  sofar = max_pair(sofar, v.z & 0x7fff7fffu);
  return max_pair(sofar, v.w & 0x7fff7fffu);
}

// Codes of two bf16 in one word.
__device__ __forceinline__ u32 codes_of(u32 pair, bool divide, float step) {
  return encode_e4m3(apply(divide, bits_f32(pair << 16), step),
                     apply(divide, bits_f32(pair & 0xffff0000u), step));
}

__device__ __forceinline__ uint2 codes_of(const uint4& v, bool divide, float step) {
  return make_uint2(codes_of(v.x, divide, step) | codes_of(v.y, divide, step) << 16,
                    codes_of(v.z, divide, step) | codes_of(v.w, divide, step) << 16);
}

__device__ __forceinline__ uint2 exchanged(uint2 v) {
  return make_uint2(__shfl_xor_sync(0xffffffffu, v.x, 1), __shfl_xor_sync(0xffffffffu, v.y, 1));
}

// 16-byte chunks of a tile that a thread has in registers, between maximum and codes.
const int CHUNKS = 8;

// Agrees on the scale of a tile; gives what its elements are multiplied or divided by.
__device__ __forceinline__ float settle(const Job& job, u32 high, u32* bad, u32& turn) {
  u32 amax = block_max(max(high & 0xffff, high >> 16), turn) << 16;
  float scale = scale_of(job.recipe, amax);
  if (threadIdx.x == 0) {
    store_scale(job.aux, job.scales, scale);
    if (amax >= INFINITY_BITS) mark(bad, job.unit);
  }
  return step_of(job.recipe, scale);
}

// A whole bf16 tile, aligned to 16 bytes.
template <bool DIVIDE>
__device__ __forceinline__ void quantize_full(const Job& job, u32* bad, u32& turn) {
  const u32 lane = threadIdx.x % 16, first = threadIdx.x / 16;
  const u64 src = job.src + (u64)first * job.src_row + lane * 16;
  uint4 v[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) v[i] = load_once(src + (u64)i * 16 * job.src_row);
  u32 high = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) high = absolute_max(high, v[i]);
  const float step = settle(job, high, bad, turn);
  // Neighbours swap halves, so that each stores 16 bytes of one row.
  const bool odd = threadIdx.x & 1;
  const u64 dst = job.dst + (u64)(first + (odd ? 16 : 0)) * job.dst_row + (lane & ~1u) * 8;
#pragma unroll
  for (int i = 0; i < CHUNKS; i += 2) {
    uint2 a = codes_of(v[i], DIVIDE, step), b = codes_of(v[i + 1], DIVIDE, step);
    uint2 other = exchanged(odd ? a : b);
    uint4 out = odd ? make_uint4(other.x, other.y, b.x, b.y) : make_uint4(a.x, a.y, other.x, other.y);
    __stcs((uint4*)(dst + (u64)i * 16 * job.dst_row), out);
  }
}

// Any tile whose rows are multiples of 8 elements: 8-byte stores.
__device__ __forceinline__ void quantize_ragged(const Job& job, u32* bad, u32& turn) {
  const u32 chunks = job.cols / 8, all = chunks * job.rows;
  const Divider row(chunks);
  uint4 v[CHUNKS];
  u32 high = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    u32 at = threadIdx.x + i * THREADS;
    if (at < all) {
      u32 r = row.of(at);
      v[i] = load_once(job.src + (u64)r * job.src_row + row.rest(at, r) * 16);
      high = absolute_max(high, v[i]);
    }
  }
  const float step = settle(job, high, bad, turn);
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    u32 at = threadIdx.x + i * THREADS;
    if (at < all) {
      u32 r = row.of(at);
      __stcs((uint2*)(job.dst + (u64)r * job.dst_row + row.rest(at, r) * 8),
             codes_of(v[i], job.recipe == PRIME_RL, step));
    }
  }
}

// ---- copies ----

template <typename T>
__device__ __forceinline__ bool bad_word(u32 dtype, T word) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < (int)(sizeof(T) / 4); i++) {
    u32 w = ((const u32*)&word)[i];
    switch (dtype) {
      case F32: found |= (w & NAN_BITS) >= INFINITY_BITS; break;
      case BF16: found |= (w & 0x7fff) >= 0x7f80 || (w >> 16 & 0x7fff) >= 0x7f80; break;
      case F16: found |= (w & 0x7fff) >= 0x7c00 || (w >> 16 & 0x7fff) >= 0x7c00; break;
      case E4M3: found |= __vcmpeq4(w & 0x7f7f7f7fu, 0x7f7f7f7fu) != 0; break;
      case E8M0: found |= __vcmpeq4(w, 0xffffffffu) != 0; break;
      default: break;
    }
  }
  return found;
}

// Rows of 16-byte chunks; only looked at if `store` is false.
__device__ __forceinline__ void copy_wide(const Job& job, u32 chunks, bool store, u32* bad) {
  const Divider row(chunks);
  const u32 all = chunks * job.rows;
  bool found = false;
  for (u32 start = threadIdx.x; start < all; start += CHUNKS * THREADS) {
    uint4 v[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      u32 at = start + i * THREADS, r = row.of(at);
      if (at < all) v[i] = load_once(job.src + (u64)r * job.src_row + row.rest(at, r) * 16);
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      u32 at = start + i * THREADS, r = row.of(at);
      if (at < all) {
        found |= bad_word(job.dtype, v[i]);
        if (store) __stcs((uint4*)(job.dst + (u64)r * job.dst_row + row.rest(at, r) * 16), v[i]);
      }
    }
  }
  if (found) mark(bad, job.unit);
}

template <typename T>
__device__ __forceinline__ void copy_elements(const Job& job, bool store, u32* bad) {
  const Divider row(job.cols);
  const u32 all = job.cols * job.rows;
  bool found = false;
  for (u32 at = threadIdx.x; at < all; at += THREADS) {
    u32 r = row.of(at), c = row.rest(at, r);
    T v = *(const T*)(job.src + (u64)r * job.src_row + c * sizeof(T));
    found |= bad_bits(job.dtype, v);
    if (store) *(T*)(job.dst + (u64)r * job.dst_row + c * sizeof(T)) = v;
  }
  if (found) mark(bad, job.unit);
}

__device__ __forceinline__ void copy_rows(const Job& job, bool store, u32* bad) {
  u32 size = size_of(job.dtype), bytes = job.cols * size;
  u64 bits = job.src | job.dst | bytes;
  if (job.rows > 1) bits |= (u64)job.src_row | (u64)job.dst_row;
  if (bits % 16 == 0) return copy_wide(job, bytes / 16, store, bad);
  if (size == 4) return copy_elements<u32>(job, store, bad);
  if (size == 2) return copy_elements<u16>(job, store, bad);
  copy_elements<u8>(job, store, bad);
}

// Raises words to those of another rank.
__device__ void maximum(const Job& job) {
  for (u32 i = threadIdx.x; i < job.cols; i += THREADS) {
    u32 other = ((const volatile u32*)job.src)[i];
    u32* own = (u32*)job.dst + i;
    if (other > *own) *own = other;
  }
}

// ---- boxes: any expression, through shared memory ----

__device__ __forceinline__ u32 load_bits(const Operand& o, u32 r, u32 c) {
  i64 row = r, col = c;
  if (o.block != 1) {
    row = (o.phase_row + r * o.step) / o.block;
    col = (o.phase_col + c * o.step) / o.block;
  }
  u64 address = o.address + row * o.row + col * o.col;
  u32 size = size_of(o.dtype);
  return size == 4 ? *(const u32*)address : size == 2 ? *(const u16*)address : *(const u8*)address;
}

// Elements that are only loaded, the most of all: no operations to look up.
__device__ __forceinline__ bool loaded(const Segment& s, const Operand& o, float* values, u32 pitch) {
  const u32 all = s.rows * s.cols;
  const Divider major(s.flags & BY_COLUMN ? s.rows : s.cols);
  bool bad = false;
  for (u32 start = threadIdx.x; start < all; start += 2 * BATCH * THREADS) {
    u32 bits[2 * BATCH];
#pragma unroll
    for (int i = 0; i < 2 * BATCH; i++) {
      u32 at = min(start + i * THREADS, all - 1), q = major.of(at), rest = major.rest(at, q);
      bits[i] = load_bits(o, s.flags & BY_COLUMN ? rest : q, s.flags & BY_COLUMN ? q : rest);
    }
#pragma unroll
    for (int i = 0; i < 2 * BATCH; i++) {
      u32 at = start + i * THREADS;
      if (at < all) {
        u32 q = major.of(at), rest = major.rest(at, q);
        u32 row = s.flags & BY_COLUMN ? rest : q, col = s.flags & BY_COLUMN ? q : rest;
        if (s.flags & (WATCHED | RAW)) bad |= bad_bits(o.dtype, bits[i]);
        float x = s.flags & RAW ? bits_f32(bits[i]) : decode(o.dtype, bits[i]);
        values[(s.row + row) * pitch + s.col + col] = x;
      }
    }
  }
  return bad;
}

// Evaluates a segment into the box's shared memory; true if something was not finite.
__device__ bool segment(const Header& t, const Segment& s, float* values, u32 pitch) {
  const Op* ops = (const Op*)t.ops + s.ops;
  const Operand* operands = (const Operand*)t.operands + s.operands;
  if (s.op_count == 1 && (ops->what == LOAD || ops->what == RAW_LOAD)) {
    return loaded(s, operands[ops->arg], values, pitch);
  }
  const u32 all = s.rows * s.cols;
  const Divider major(s.flags & BY_COLUMN ? s.rows : s.cols);
  bool bad = false;
  for (u32 start = threadIdx.x; start < all; start += BATCH * THREADS) {
    float x[BATCH], kept[3][BATCH];
    u32 row[BATCH], col[BATCH];
    int depth = 0;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      u32 at = min(start + i * THREADS, all - 1);
      u32 quotient = major.of(at), rest = major.rest(at, quotient);
      row[i] = s.flags & BY_COLUMN ? rest : quotient;
      col[i] = s.flags & BY_COLUMN ? quotient : rest;
    }
    for (u32 k = 0; k < s.op_count; k++) {
      Op op = ops[k];
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        switch (op.what) {
          case RAW_LOAD: {
            const Operand& o = operands[op.arg];
            u32 bits = load_bits(o, row[i], col[i]);
            bad |= bad_bits(o.dtype, bits);
            x[i] = bits_f32(bits);
            break;
          }
          case LOAD: {
            const Operand& o = operands[op.arg];
            u32 bits = load_bits(o, row[i], col[i]);
            if (s.flags & WATCHED) bad |= bad_bits(o.dtype, bits);
            x[i] = decode(o.dtype, bits);
            break;
          }
          case LOAD_MULTIPLY: {
            const Operand& o = operands[op.arg];
            u32 bits = load_bits(o, row[i], col[i]);
            if (s.flags & WATCHED) bad |= bad_bits(o.dtype, bits);
            x[i] = __fmul_rn(x[i], decode(o.dtype, bits));
            break;
          }
          case RAW_FILL:
          case FILL: x[i] = bits_f32(op.arg); break;
          case ROUND: x[i] = rounded(op.arg, x[i]); break;
          case MULTIPLY: x[i] = __fmul_rn(x[i], bits_f32(op.arg)); break;
          case PUSH: kept[depth][i] = x[i]; break;
          case ADD: x[i] = __fadd_rn(kept[depth - 1][i], x[i]); break;
        }
      }
      if (op.what == PUSH) depth++;
      if (op.what == ADD) depth--;
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (start + i * THREADS < all) {
        if (!(s.flags & RAW) && s.flags & NOT_CONSTANT) bad |= !finite(x[i]);
        values[(s.row + row[i]) * pitch + s.col + col[i]] = x[i];
      }
    }
  }
  return bad;
}

__device__ u32 box_max(const float* values, u32 pitch, u32 rows, u32 cols, u32& turn) {
  const Divider row(cols);
  u32 high = 0;
  for (u32 at = threadIdx.x; at < rows * cols; at += THREADS) {
    u32 r = row.of(at);
    high = max(high, f32_bits(values[r * pitch + row.rest(at, r)]) & NAN_BITS);
  }
  return block_max(high, turn);
}

__device__ __forceinline__ u32 code_of(u32 recipe, float x, float step) {
  return encode_e4m3(apply(recipe == PRIME_RL, x, step), 0.0f) & 0xff;
}

__device__ __forceinline__ float through(u32 recipe, float x, float scale, float step, u32 dtype) {
  return rounded(dtype, __fmul_rn(decode_e4m3(code_of(recipe, x, step)), scale));
}

// Elements of a box's stored part, `N` bytes at a time where they lie so.
template <typename Bits>
__device__ void store_part(const Evaluation& b, u32 size, Bits bits) {
  const u32 rows = b.store_rows, cols = b.store_cols, wide = 16 / size;
  bool aligned = b.dst_col == size && cols % wide == 0 && b.dst % 16 == 0 && b.dst_row % 16 == 0;
  if (aligned) {
    const u32 chunks = cols / wide;
    const Divider by(chunks);
    for (u32 at = threadIdx.x; at < rows * chunks; at += THREADS) {
      u32 row = by.of(at), col = by.rest(at, row) * wide;
      u32 words[4];
#pragma unroll
      for (int w = 0; w < 4; w++) {
        u32 word = 0;
        for (u32 k = 0; k < 4 / size; k++) word |= bits(row, col + w * (4 / size) + k) << (8 * size * k);
        words[w] = word;
      }
      *(uint4*)(b.dst + row * b.dst_row + col * size) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    return;
  }
  // A target that runs along rows is written along rows.
  bool down = b.dst_row == size && b.dst_col != size;
  const Divider by(down ? rows : cols);
  for (u32 at = threadIdx.x; at < rows * cols; at += THREADS) {
    u32 quotient = by.of(at), rest = by.rest(at, quotient);
    u32 row = down ? rest : quotient, col = down ? quotient : rest;
    u64 to = b.dst + row * b.dst_row + col * b.dst_col;
    u32 v = bits(row, col);
    if (size == 4) *(u32*)to = v;
    else if (size == 2) *(u16*)to = v;
    else *(u8*)to = v;
  }
}

__device__ void tile(const Evaluation& b, float* values, u32 pitch, u32* bad, u32& turn) {
  bool agreed = b.amax != 0;
  u32 amax = agreed ? *(const volatile u32*)b.amax : box_max(values, pitch, b.rows, b.cols, turn);
  bool infinite = amax >= INFINITY_BITS;
  for (u32 k = 0; k + 1 < b.step_count; k++) {
    u32 recipe = b.recipe[k], dtype = b.between[k];
    float scale = scale_of(recipe, amax), step = step_of(recipe, scale);
    for (u32 at = threadIdx.x; at < b.rows * b.cols; at += THREADS) {
      float* x = values + at / b.cols * pitch + at % b.cols;
      *x = through(recipe, *x, scale, step, dtype);
    }
    __syncthreads();
    amax = agreed ? f32_bits(through(recipe, bits_f32(amax), scale, step, dtype)) & NAN_BITS
                  : box_max(values, pitch, b.rows, b.cols, turn);
    infinite |= amax >= INFINITY_BITS;
  }
  u32 recipe = b.recipe[b.step_count - 1];
  float scale = scale_of(recipe, amax), step = step_of(recipe, scale);
  if (threadIdx.x == 0 && infinite) mark(bad, b.unit);
  for (u32 at = threadIdx.x; at < b.scale_rows * b.scale_cols; at += THREADS) {
    u64 to = b.scale + at / b.scale_cols * b.scale_row + at % b.scale_cols * b.scale_col;
    store_scale(to, b.scales, scale);
  }
  if (b.dst == 0) return;
  store_part(b, 1, [&](u32 r, u32 c) {
    return code_of(recipe, values[(b.store_row + r) * pitch + b.store_col + c], step);
  });
}

__device__ __forceinline__ void evaluation(const Header& t, const Evaluation& b, float* values, u32* bad, u32& turn) {
  const u32 pitch = b.cols | 1;
  bool found = false, raw = false;
  for (u32 i = 0; i < b.segment_count; i++) {
    const Segment& s = ((const Segment*)t.segments)[b.segments + i];
    raw |= s.flags & RAW;
    found |= segment(t, s, values, pitch);
  }
  if (found) mark(bad, b.unit);
  __syncthreads();
  switch (b.mode) {
    case VALUES:
      store_part(b, size_of(b.dtype), [&](u32 r, u32 c) {
        float x = values[(b.store_row + r) * pitch + b.store_col + c];
        return raw ? f32_bits(x) : encode(b.dtype, x);
      });
      break;
    case TILE: tile(b, values, pitch, bad, turn); break;
    case AMAX: {
      u32 amax = box_max(values, pitch, b.rows, b.cols, turn);
      if (threadIdx.x == 0) {
        atomicMax((u32*)b.amax, amax);
        if (amax >= INFINITY_BITS) mark(bad, b.unit);
      }
      break;
    }
  }
  // The next job of this block writes the same shared memory.
  __syncthreads();
}

__device__ __forceinline__ Job job_at(const Job* jobs, u32 i) {
  Job job;
#pragma unroll
  for (int k = 0; k < (int)(sizeof(Job) / 16); k++) ((uint4*)&job)[k] = __ldg((const uint4*)(jobs + i) + k);
  return job;
}

// With a block for each job the hardware overlaps loads of some with stores of others: 10 % faster
// on an H100 than blocks that go on to further jobs, which is for launches that must leave room.
extern "C" __global__ void __launch_bounds__(THREADS, 4) quantize(const Header* table, u32* bad) {
  u32 turn = 0;
  for (u32 i = blockIdx.x; i < table->count; i += gridDim.x) {
    const Job job = job_at((const Job*)table->jobs, i);
    if (job.rows != 128 || job.cols != 128) quantize_ragged(job, bad, turn);
    else if (job.recipe == PRIME_RL) quantize_full<true>(job, bad, turn);
    else quantize_full<false>(job, bad, turn);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) copy(const Header* table, u32* bad) {
  for (u32 i = blockIdx.x; i < table->count; i += gridDim.x) {
    const Job job = job_at((const Job*)table->jobs, i);
    if (job.kind == MAXIMUM) maximum(job);
    else copy_rows(job, job.kind == COPY, bad);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) evaluate(const Header* table, u32* bad) {
  extern __shared__ float values[];
  const Header t = *table;
  u32 turn = 0;
  for (u32 i = blockIdx.x; i < t.count; i += gridDim.x) {
    u64 index = ((const Job*)t.jobs)[i].src;
    evaluation(t, ((const Evaluation*)t.evaluations)[index], values, bad, turn);
  }
}
