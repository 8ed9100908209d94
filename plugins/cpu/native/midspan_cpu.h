/* The C interface of the CPU plugin's kernels.
 *
 * For: calling them through ctypes, with pointers and sizes and no array library.
 * Knows nothing about graphs, tensors, Python or the scheduler.
 *
 * Rules for every function:
 *   - a row of a matrix is contiguous; rows lie `*_stride` ELEMENTS apart, so that a column
 *     slice of a wider matrix is taken as it is (stride 0 repeats one row);
 *   - sizes are counts of elements, all int64_t; strides, pointers and sizes are
 *     the caller's responsibility: what cannot be checked cheaply is not checked;
 *   - returns MIDSPAN_CPU_OK or an error, whose text midspan_cpu_error_text gives;
 *   - outputs must not overlap inputs, unless said otherwise;
 *   - arithmetic is float32, outputs are rounded once, to nearest even;
 *   - the bits of an output row are a function of that row's inputs alone: not of the other
 *     rows of the call, of the number of threads, or of how the work was divided.
 *     They may differ between instruction sets.
 *
 * A context may be used from one thread at a time for speed; calls that meet in one context are
 * safe, the later one then runs on its own thread alone. A context does not survive fork().
 */
#ifndef MIDSPAN_CPU_H
#define MIDSPAN_CPU_H

#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

#define MIDSPAN_CPU_ABI_VERSION 5

/* Results. */
enum {
  MIDSPAN_CPU_OK = 0,
  MIDSPAN_CPU_UNSUPPORTED = 1,   /* a type, format or size that the kernel does not serve */
  MIDSPAN_CPU_OUT_OF_MEMORY = 2, /* no room for scratch memory */
  MIDSPAN_CPU_OUT_OF_RANGE = 3   /* a token id, position, slot or block number outside its table */
};

/* Element types of activations and caches. */
enum { MIDSPAN_CPU_FLOAT32 = 0, MIDSPAN_CPU_BFLOAT16 = 1, MIDSPAN_CPU_FLOAT16 = 2 };

/* Further types of caches; what a row becomes in them is what midspan.interface.CacheLayout says. */
enum {
  MIDSPAN_CPU_CACHE_FLOAT8_E4M3 = 8, /* saturates, keeps NaN */
  MIDSPAN_CPU_CACHE_INT8 = 9         /* with a bfloat16 scale for each token and kv head */
};

/* Weight formats; the first three equal the element types. GGUF formats are as published by
 * the GGUF specification: blocks of 32 columns. The last ones are rows of small numbers with scales beside them. */
enum {
  MIDSPAN_CPU_DENSE_FLOAT32 = 0,
  MIDSPAN_CPU_DENSE_BFLOAT16 = 1,
  MIDSPAN_CPU_DENSE_FLOAT16 = 2,
  MIDSPAN_CPU_DENSE_PAIRS = 3, /* bfloat16 weights, for bfloat16 inputs alone, see midspan_cpu_dense_format */
  MIDSPAN_CPU_GGUF_Q4_0 = 16,  /* 18 bytes: fp16 d, 16 bytes of nibbles; w = d * (q - 8) */
  MIDSPAN_CPU_GGUF_Q4_1 = 17,  /* 20 bytes: fp16 d, fp16 m, 16 bytes of nibbles; w = d * q + m */
  MIDSPAN_CPU_GGUF_Q8_0 = 18,  /* 34 bytes: fp16 d, 32 int8; w = d * q */
  MIDSPAN_CPU_GGUF_Q5_0 = 19,  /* 22 bytes: as Q4_0 with fifth bits and 16 subtracted; packed to 8 bits */
  MIDSPAN_CPU_GGUF_Q5_1 = 20,  /* 24 bytes: as Q4_1 with fifth bits; packed to 8 bits */
  MIDSPAN_CPU_GGUF_Q4_K = 21,  /* blocks of 256, 144 bytes: six-bit scales and minimums for each 32 columns */
  MIDSPAN_CPU_GGUF_Q5_K = 22,  /* the same with fifth bits, 176 bytes; packed to 8 bits */
  MIDSPAN_CPU_GGUF_Q6_K = 23,  /* blocks of 256, 210 bytes: 8-bit scales for each 16 columns; packed to 8 bits */
  MIDSPAN_CPU_INT8_CHANNEL = 32, /* int8 q, a scale for each output; w = scale * q */
  MIDSPAN_CPU_FP8_CHANNEL = 33,  /* float8 e4m3fn q, a scale for each output; w = scale * q */
  MIDSPAN_CPU_INT8_DYNAMIC = 34, /* as INT8_CHANNEL; inputs become integers in [-127, 127] too, with one scale a row */
  MIDSPAN_CPU_INT4_GROUP = 35    /* nibbles q, column 2i in the low half of byte i; w = scale * (q - zero) with a scale
                                    and a zero for each `group` columns, a multiple of 32 */
};

/* Gate functions. */
enum { MIDSPAN_CPU_SILU = 0, MIDSPAN_CPU_GELU = 1 /* with erf */, MIDSPAN_CPU_GELU_TANH = 2 };

/* ---- library and context ------------------------------------------------------------- */

/* MIDSPAN_CPU_ABI_VERSION of the library; differs from the header's when they do not belong together. */
uint32_t midspan_cpu_abi_version(void);

/* A short English text for a result; never NULL, never freed. */
const char* midspan_cpu_error_text(int32_t result);

/* Names of the instruction sets that this library holds AND this processor runs, best first,
 * separated by spaces: "avx512vnni avx512 avx2 portable". */
const char* midspan_cpu_instruction_sets(void);

/* Runs body(begin, end, argument) over sub-ranges of [begin, end) on several threads and returns
 * when all are done. The signature of torch_parallel_for in libtorch_cpu. */
typedef int32_t (*midspan_cpu_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                            void (*body)(int64_t, int64_t, void*), void* argument);

typedef struct midspan_cpu_context midspan_cpu_context;

/* Makes a context.
 *   instruction_set: one of the names above, or NULL for the best.
 *   threads: how many threads share the work, the calling one included, 1 to 1024.
 *   parallel_for: how to reach them, or NULL for threads of the context's own.
 *   spin_microseconds: how long an idle own thread, and a caller waiting for the last task, polls
 *     before it sleeps; no meaning with parallel_for.
 * Returns NULL when the instruction set is unknown or not runnable here, or memory lacks. */
midspan_cpu_context* midspan_cpu_create(const char* instruction_set, int32_t threads,
                                        midspan_cpu_parallel_for parallel_for, int32_t spin_microseconds);

/* Ends the context's threads and frees its scratch memory. NULL is fine. */
void midspan_cpu_destroy(midspan_cpu_context* context);

/* Name of the context's instruction set. */
const char* midspan_cpu_instruction_set(const midspan_cpu_context* context);

/* Asks the system for huge pages under [address, address + bytes): worth it for packed weights and
 * caches of some megabytes, before they are first written. Only a hint. */
void midspan_cpu_advise_huge_pages(void* address, int64_t bytes);

/* Reads [data, data + bytes), whole MiB of it and at least one, on the context's threads, as float32 into *sum: how fast
 * this machine reads memory is what bounds a step of few rows. */
int32_t midspan_cpu_read(midspan_cpu_context* context, const void* data, int64_t bytes, float* sum);

/* ---- linear -------------------------------------------------------------------------- */

/* A weight before it is packed. */
typedef struct {
  const void* rows;    /* n rows in `format`, row_bytes apart (GGUF: the file's own bytes; DENSE_PAIRS: bfloat16) */
  int64_t row_bytes;
  const float* scales;  /* [n], or [n, k / group], for formats that have them; else not read */
  const uint8_t* zeros; /* [n, k / group], for INT4_GROUP; else not read */
  int64_t n;           /* outputs */
  int64_t k;           /* inputs */
  int32_t format;
  int32_t group; /* for INT4_GROUP: columns of a scale */
} midspan_cpu_weight;

/* The dense format in which a weight of an element type is multiplied fastest with inputs of an element type: the
 * weight's own, or DENSE_PAIRS where this instruction set has products of pairs. */
int32_t midspan_cpu_dense_format(const midspan_cpu_context* context, int32_t weight_type, int32_t input_type);

/* Bytes of a weight once packed; 0 when the format or k is not supported (GGUF: k must be a
 * multiple of the block). Addresses are not read. */
int64_t midspan_cpu_packed_linear_bytes(const midspan_cpu_weight* weight);

/* Packs a weight for MIDSPAN_CPU_OP_LINEAR. Packed bytes are the same for all instruction sets.
 *   packed: midspan_cpu_packed_linear_bytes bytes, aligned to 64. */
int32_t midspan_cpu_pack_linear(midspan_cpu_context* context, const midspan_cpu_weight* weight, void* packed);

/* What stays the same between calls of one linear. */
typedef struct {
  const void* packed;
  const float* bias;   /* [n] or NULL */
  int64_t n;           /* outputs */
  int64_t k;           /* inputs */
  int32_t format;      /* weight format */
  int32_t input_type;  /* element type of x */
  int32_t output_type; /* element type of y: input_type or FLOAT32 */
  float scale;         /* y = soft_cap((x . w + bias) * scale) */
  float soft_cap;      /* c * tanh(y / c); 0 for none */
  int32_t group;       /* for INT4_GROUP: columns of a scale */
  const int32_t* order; /* for INT4_GROUP: column j of the weight belongs to input order[j], below k; or NULL */
} midspan_cpu_linear;

/* ---- row operations ------------------------------------------------------------------ */

/* What stays the same between calls of one rotary. */
typedef struct {
  const float* table; /* [table_rows, rotary_size]: row p holds cos then sin of p * inverse_frequencies[i],
                         rotary_size / 2 of each, times the amplitude */
  int64_t table_rows; /* positions below this are allowed */
  int64_t head_size;
  int64_t rotary_size; /* even, <= head_size; the other columns are copied */
  int64_t query_heads;
  int64_t key_heads;
  int32_t type;
  int32_t interleaved; /* 1: pairs (2i, 2i+1); 0: pairs (i, i + rotary_size / 2) */
} midspan_cpu_rotary;

/* ids[r] = the column of the largest of logits[r] (float32), the lowest one among equals; failed[r] = 1, and
 * ids[r] = 0, when the row holds a NaN or plus infinity, or nothing but minus infinity; else 0. */
int32_t midspan_cpu_argmax(midspan_cpu_context* context, const float* logits, int64_t logits_stride, int64_t rows,
                           int64_t columns, int32_t* ids, uint8_t* failed);

/* How to choose a token for each of some rows; what it means stands in midspan.runtimes.reference.sampling. */
typedef struct {
  const float* temperature;     /* [rows], 0 for the largest */
  const int32_t* top_k;         /* [rows] */
  const float* top_p;           /* [rows] */
  const float* min_p;           /* [rows] */
  const float* numbers;         /* [rows], uniform in [0, 1) */
  const int32_t* edit_starts;   /* [rows + 1]: which edits are a row's; NULL for no edits */
  const int32_t* edit_ids;      /* columns */
  const float* edit_repetition; /* factors, see the definition */
  const float* edit_bias;
  const uint32_t* allowed; /* [rows, allowed_words], a bit for each column; NULL: all are allowed */
  int64_t allowed_words;
  const int32_t* targets;    /* [rows], and */
  const uint8_t* has_target; /* [rows]: the row's token is the target; NULL: no row is so */
} midspan_cpu_sampling;

/* ids[r] = the token of row r, logits float32; failed[r] = 1, and ids[r] = 0, for rows that cannot be sampled. */
int32_t midspan_cpu_sample(midspan_cpu_context* context, const midspan_cpu_sampling* sampling, const float* logits,
                           int64_t logits_stride, int64_t rows, int64_t columns, int32_t* ids, uint8_t* failed);

/* ---- attention ----------------------------------------------------------------------- */

/* What stays the same between calls of one attention layer.
 *
 * The layer's cache: keys lie TRANSPOSED within a block, values as rows:
 *   key_cache   [blocks, kv_heads, key_size, block_size]
 *   value_cache [blocks, kv_heads, block_size, value_size]
 * Both C-contiguous in cache_type, aligned to 64. With scales, the block_size scales of a block's head follow its
 * numbers directly, so that a head of a block takes size * block_size + 2 * block_size bytes. */
typedef struct {
  void* key_cache;
  void* value_cache;
  int64_t blocks;
  int64_t block_size; /* a multiple of 16; 32 and more is read a little faster */
  int64_t heads;      /* a multiple of kv_heads; query head h reads kv head h / (heads / kv_heads) */
  int64_t kv_heads;
  int64_t key_size;
  int64_t value_size;
  int64_t window;            /* positions a token sees, itself included; 0 for all */
  const float* alibi_slopes; /* [heads] or NULL: score += slope * (key position - query position) */
  const float* sinks;        /* [heads] or NULL: one more score in the softmax, without value */
  float scale;
  float soft_cap;     /* score = c * tanh(score / c), after the scale; 0 for none */
  int32_t type;       /* element type of query, key, value and the output */
  int32_t cache_type; /* an element type or a further type of caches, all pairs are served */
} midspan_cpu_attention;

/* ---- mixture of experts ---------------------------------------------------------------- */

/* How experts are chosen; what it means stands in midspan.runtimes.reference.mixture. */
typedef struct {
  const float* bias; /* [experts], added to scores to rank experts, or NULL */
  int64_t experts;
  int64_t chosen;
  int64_t groups;     /* 1 for none */
  int64_t top_groups; /* groups that can be chosen from */
  int32_t type;       /* element type of the logits */
  int32_t sigmoid;    /* 1: scores are sigmoids; 0: softmax over all */
  int32_t two_largest; /* 1: a group counts as much as its two best together, and scores rank; 0: as its best */
  int32_t normalize;  /* 1: chosen scores are divided by their sum */
  float scale;
} midspan_cpu_route;

/* One matrix [n, k] of each expert, packed each by itself. */
typedef struct {
  const void* packed;
  int64_t bytes;       /* from expert to expert, a multiple of 64 */
  int64_t strip_bytes; /* of 64 packed outputs */
  const float* bias;   /* of the first expert, or NULL */
  int64_t bias_stride; /* from expert to expert */
  int32_t format;
  int32_t group; /* for INT4_GROUP: columns of a scale */
} midspan_cpu_matrices;

/* What stays the same between calls of one layer of experts:
 * h = function(min(gate, limit) * slope) / slope * (clamp(up, -limit, limit) + up_offset), rounded to the type;
 * y = sum over chosen of share * (h . down + bias). */
typedef struct {
  midspan_cpu_matrices gate; /* [inner, hidden] */
  midspan_cpu_matrices up;   /* [inner, hidden], in gate's format */
  midspan_cpu_matrices down; /* [hidden, inner] */
  int64_t experts;
  int64_t chosen;
  int64_t hidden;
  int64_t inner;
  int32_t type;
  int32_t function; /* gate function */
  float limit;      /* infinite for none */
  float slope;
  float up_offset;
} midspan_cpu_experts;

/* ---- plan: kernels, one behind the other ------------------------------------------------- */

/* What an instruction runs. Matrices have `rows` rows; integers[i] is the number of a step's array. */
enum {
  /* config: midspan_cpu_linear. y[rows, n] = x[rows, k] @ weight^T. GGUF and INT4_GROUP: x is rounded to 16-bit integers
   * with one scale for each 32 columns (relative error 2^-16 of the largest of the 32), the products are exact.
   * INT8_DYNAMIC: x is rounded to x / s, s = largest magnitude of its row / 127, and y = (q_x . q) * s * scale.
   * DENSE_PAIRS: subnormal numbers count as zero. */
  MIDSPAN_CPU_OP_LINEAR = 0,
  /* config: float weight[config_columns], real: epsilon. y = x / sqrt(mean(x^2) + epsilon) * (weight + offset) over
   * each run of config_columns columns; columns % config_columns == 0. y may be x. */
  MIDSPAN_CPU_OP_RMS_NORM = 1,
  /* The same of the sum: y2 = x + x2, rounded to the type; y = rms_norm(y2). y2 may be x or x2. */
  MIDSPAN_CPU_OP_ADD_RMS_NORM = 2,
  /* code: gate function. y = function(x) * x2. For gated_pair: x2 = x + columns. y may be x or x2. */
  MIDSPAN_CPU_OP_GATED = 3,
  /* config: midspan_cpu_rotary; integers[0]: positions [rows]. Rotates x, the query [rows, query_heads * head_size],
   * and x2, the key [rows, key_heads * head_size], to y and y2, which may be x and x2. */
  MIDSPAN_CPU_OP_ROTARY = 4,
  /* config: a table of config_columns rows in any weight format (code), UNPACKED (GGUF: the file's own bytes), rows
   * row_bytes apart; integers[0]: ids [rows]; real: scale. y[i] = table[ids[i]] * scale. */
  MIDSPAN_CPU_OP_EMBEDDING = 5,
  /* integers[0]: numbers of rows of x, which has as many as the step has tokens. y[i] = x[integers[0][i]]. */
  MIDSPAN_CPU_OP_SELECT_ROWS = 6,
  /* config: midspan_cpu_attention; integers[0]: slots [rows], slot = block * block_size + offset. Writes x, the keys
   * [rows, kv_heads * key_size], and x2, the values [rows, kv_heads * value_size], into the cache. */
  MIDSPAN_CPU_OP_WRITE_CACHE = 7,
  /* config: midspan_cpu_attention; integers: query_starts [requests + 1], context_lengths [requests], block_table
   * [requests, stride] whose entry i holds positions i * block_size and on. Each token of x, the queries
   * [tokens, heads * key_size], attends to its request's cached tokens at its own position and before, to
   * y [tokens, heads * value_size]. Bits are the same in one prefill, in chunks of any size, and in decode. Cache
   * positions at and after context_lengths, and those before every query's window, are not used, whatever they hold. */
  MIDSPAN_CPU_OP_ATTENTION = 8,
  /* config: midspan_cpu_route. x: logits [rows, experts]; y: int32 numbers of experts [rows, chosen], best first; y2:
   * their shares, float32 [rows, chosen]. */
  MIDSPAN_CPU_OP_ROUTE = 20,
  /* config: midspan_cpu_experts. x: rows [rows, hidden]; x2: int32 numbers of experts [rows, chosen]; y2, which is READ:
   * their shares, float32 [rows, chosen]; y: [rows, hidden]. */
  MIDSPAN_CPU_OP_EXPERTS = 21,
  /* code: 1 for sigmoid, 0 for none. y[i] = x[i] * function(x2[i][0]). y may be x. */
  MIDSPAN_CPU_OP_SCALE_ROWS = 22,
  /* y = x + x2; y = x * x2. y may be x or x2. */
  MIDSPAN_CPU_OP_ADD = 23,
  MIDSPAN_CPU_OP_MULTIPLY = 24,
  /* y = x * real. y may be x. */
  MIDSPAN_CPU_OP_SCALE = 25
};

/* Which of a step's counts is the number of an instruction's rows. */
enum { MIDSPAN_CPU_ROWS_TOKENS = 0, MIDSPAN_CPU_ROWS_SAMPLED = 1 };

typedef struct {
  void* data;
  int64_t stride;
} midspan_cpu_matrix;

typedef struct {
  int32_t op;
  int32_t rows; /* MIDSPAN_CPU_ROWS_... */
  int32_t type; /* element type of the matrices */
  int32_t code;
  int32_t integers[4]; /* numbers of the step's integer arrays */
  const void* config;
  int64_t config_columns;
  int64_t row_bytes;
  int64_t columns;
  float real; /* epsilon of a norm, or a factor */
  float offset;
  midspan_cpu_matrix x, x2, y, y2;
} midspan_cpu_instruction;

/* What differs between steps. */
typedef struct {
  int64_t tokens;
  int64_t requests;
  int64_t sampled;
  const int32_t* const* integers; /* arrays by number */
  const int64_t* strides;         /* elements between rows of each, for block tables */
} midspan_cpu_step;

/* Runs instructions in order.
 *   nanoseconds: [count], gets what each took, or NULL.
 *   failed: gets the number of the instruction whose result is returned when it is not MIDSPAN_CPU_OK. */
int32_t midspan_cpu_run_plan(midspan_cpu_context* context, const midspan_cpu_instruction* instructions, int64_t count,
                             const midspan_cpu_step* step, int64_t* nanoseconds, int64_t* failed);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
