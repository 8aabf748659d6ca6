#ifndef TETROMINO_C_H
#define TETROMINO_C_H

/**
 * \file
 * The C interface: rows of numbers to 4-bit blocks and back, and placements of experts, from C99, C++ and whatever can
 * call C. Link the target tetromino::c. Calls keep no state and can run on several threads at once; no exception leaves
 * them. Each returns TETROMINO_OK, or says what was wrong: the kind by its result, and in words, with the value
 * expected and the value found, in `message` (cut to `message_size` bytes with their end; both may be 0).
 */

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TETROMINO_C_API
#else
#define TETROMINO_C_API __attribute__((visibility("default")))
#endif

#if defined(__cplusplus)
extern "C" {
#endif

/** What a call says. */
typedef enum tetromino_status {
  TETROMINO_OK = 0,
  TETROMINO_INVALID_ARGUMENT = 1, /**< a value outside its range, or a combination that has no meaning */
  TETROMINO_SHAPE_MISMATCH = 2,   /**< sizes that do not fit together */
  TETROMINO_NON_FINITE = 3,       /**< a NaN or an infinity */
  TETROMINO_UNKNOWN_NAME = 4,     /**< a recipe that does not exist */
  TETROMINO_INFEASIBLE = 5,       /**< a request that no solution can satisfy */
  TETROMINO_NO_MEMORY = 6,        /**< an allocation failed */
  TETROMINO_FAILED = 7            /**< anything else */
} tetromino_status;

/** What numbers are in memory. */
typedef enum tetromino_type {
  TETROMINO_FLOAT = 0,
  TETROMINO_HALF = 1,
  TETROMINO_BFLOAT16 = 2,
  TETROMINO_DOUBLE = 3, /**< loads only */
  TETROMINO_INT64 = 4,  /**< loads only */
  TETROMINO_INT32 = 5   /**< loads only */
} tetromino_type;

/** One numbered piece of work: `task(work, index)`. */
typedef void (*tetromino_task)(void* work, size_t index);

/** Runs task(work, 0) ... task(work, count - 1), in any order and on any threads, and returns when all are done. */
typedef void (*tetromino_run)(void* user, size_t count, tetromino_task task, void* work);

/** The version of the library, such as "1.2.3". */
TETROMINO_C_API const char* tetromino_version(void);

/** Sizes in bytes of rows [rows, cols] packed by a recipe. */
typedef struct tetromino_sizes {
  size_t codes;  /**< [rows, blocks, block / 2], low nibble first; the last block of a row is padded */
  size_t scales; /**< [rows, blocks]: E8M0, or E4M3 for NVFP4 */
  size_t macros; /**< bytes of factors [rows, macro blocks], four factors of 2 bits in one; 0 for recipes without */
  size_t ggml;   /**< ggml's block_mxfp4 or block_nvfp4, 0 where it has no blocks for this recipe and these columns */
} tetromino_sizes;
TETROMINO_C_API tetromino_status tetromino_packed_sizes(const char* recipe, size_t rows, size_t cols,
                                                        tetromino_sizes* out, char* message, size_t message_size);

/** Where packed rows lie: in `ggml`, or where that is NULL in `codes`, `scales` and, if the recipe has them, `macros`.
 */
typedef struct tetromino_packed {
  void* ggml;
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* macros;
  float* tensor_scale; /**< what all of NVFP4 is multiplied by; NULL: 1. Packing writes it where it is 0. */
} tetromino_packed;

/** How to pack; all zero is the default. */
typedef struct tetromino_options {
  const float* column_weights; /**< [cols]: weights of squared errors, such as mean squared activations; NULL: all 1 */
  tetromino_run run;           /**< the caller's threads; NULL: the calling thread alone */
  void* user;                  /**< handed to `run` */
} tetromino_options;

/**
 * Packs x[rows, cols] by a recipe, such as "mxfp4-32/min-error" or "nvfp4/four-over-six". Column counts of ggml's
 * blocks are multiples of 32, for NVFP4 of 64. NaN and infinities are refused. `options` may be NULL.
 */
TETROMINO_C_API tetromino_status tetromino_quantize(const char* recipe, const void* x, tetromino_type type, size_t rows,
                                                    size_t cols, const tetromino_options* options,
                                                    const tetromino_packed* out, char* message, size_t message_size);

/** Unpacks rows that `recipe` has packed into out[rows, cols]. A rotation is not undone. */
TETROMINO_C_API tetromino_status tetromino_dequantize(const char* recipe, const tetromino_packed* in, size_t rows,
                                                      size_t cols, const tetromino_options* options, void* out,
                                                      tetromino_type type, char* message, size_t message_size);

/** A cluster: `nodes` of `gpus_per_node` GPUs with `slots_per_gpu` experts each. */
typedef struct tetromino_cluster {
  size_t nodes;
  size_t gpus_per_node;
  size_t slots_per_gpu;
} tetromino_cluster;

/**
 * DeepSeek EPLB's index tensors for loads[layers, experts] of any type but the 16-bit ones, with experts in `groups`
 * (1: free): physical_to_logical[layers, slots], logical_to_physical[layers, experts, slots - experts + 1] with -1
 * where there is no further copy, and copies[layers, experts] (either of the two NULL: not wanted). Equal weights are
 * packed in ascending order of index.
 */
TETROMINO_C_API tetromino_status tetromino_balanced_eplb(const void* loads, tetromino_type type, size_t layers,
                                                         size_t experts, size_t groups,
                                                         const tetromino_cluster* cluster, int64_t* physical_to_logical,
                                                         int64_t* logical_to_physical, int64_t* copies, char* message,
                                                         size_t message_size);

/**
 * Places experts such that tokens visit few nodes, from recorded ids[tokens, layers, experts_per_token], best expert
 * first, -1 for nobody (padding), of requests that follow each other with request_tokens[requests] tokens each:
 * slot_to_expert[layers, slots], -1 for a slot without expert, and node_of_request[requests], where each request is
 * served best (NULL: not wanted).
 */
TETROMINO_C_API tetromino_status tetromino_local(const int32_t* ids, size_t layers, size_t experts,
                                                 size_t experts_per_token, const uint32_t* request_tokens,
                                                 size_t requests, const tetromino_cluster* cluster,
                                                 int32_t* slot_to_expert, uint32_t* node_of_request, char* message,
                                                 size_t message_size);

#if defined(__cplusplus)
}
#endif
#endif
