/* The C interface, used as a C99 program uses it; interface.cpp compiles the same as C++17. */
#include <tetromino/c.h>

#include <stdio.h>
#include <string.h>

static int failures = 0;
#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) {                                              \
      printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                    \
    }                                                                \
  } while (0)

static const float steps[8] = {0.0f, 0.5f, -1.0f, 1.5f, 2.0f, -3.0f, 4.0f, 6.0f};

/* Every code stands for itself under the scale 1, in both layouts and every type. */
static void check_blocks(void) {
  char message[200];
  float x[2 * 32], back[2 * 32];
  uint16_t halves[2 * 32], brains[2 * 32];
  uint8_t codes[2 * 16], scales[2], blocks[2 * 17];
  tetromino_packed linear = {NULL, codes, scales, NULL, NULL}, ggml = {blocks, NULL, NULL, NULL, NULL};
  tetromino_sizes sizes;
  int i;
  for (i = 0; i < 64; ++i) x[i] = steps[i % 8];

  CHECK(tetromino_packed_sizes("mxfp4-32/floor", 2, 32, &sizes, NULL, 0) == TETROMINO_OK);
  CHECK(sizes.codes == 32 && sizes.scales == 2 && sizes.macros == 0 && sizes.ggml == sizeof blocks);
  CHECK(tetromino_packed_sizes("mxfp4-16/oas/mbs-static", 2, 33, &sizes, NULL, 0) == TETROMINO_OK);
  CHECK(sizes.codes == 2 * 24 && sizes.scales == 6 && sizes.macros == 2 && sizes.ggml == 0);

  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_FLOAT, 2, 32, NULL, &linear, message, sizeof message) == 0);
  CHECK(message[0] == '\0');
  CHECK(codes[0] == 0x10 && codes[1] == 0x3A && codes[2] == 0xD4 && codes[31] == 0x76 && scales[1] == 127);
  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_FLOAT, 2, 32, NULL, &ggml, message, sizeof message) == 0);
  CHECK(blocks[0] == 127 && blocks[1] == 0x00 && blocks[2] == 0x11 && blocks[3] == 0xAA && blocks[33] == 0x77);

  CHECK(tetromino_dequantize("mxfp4-32/floor", &ggml, 2, 32, NULL, back, TETROMINO_FLOAT, NULL, 0) == TETROMINO_OK);
  CHECK(memcmp(x, back, sizeof x) == 0);
  CHECK(tetromino_dequantize("mxfp4-32/floor", &linear, 2, 32, NULL, halves, TETROMINO_HALF, NULL, 0) == TETROMINO_OK);
  CHECK(halves[1] == 0x3800 && halves[5] == 0xC200);
  CHECK(tetromino_dequantize("mxfp4-32/floor", &linear, 2, 32, NULL, brains, TETROMINO_BFLOAT16, NULL, 0) == 0);
  CHECK(brains[1] == 0x3F00 && brains[5] == 0xC040);
  memset(codes, 0, sizeof codes);
  CHECK(tetromino_quantize("mxfp4-32/floor", brains, TETROMINO_BFLOAT16, 2, 32, NULL, &linear, NULL, 0) ==
        TETROMINO_OK);
  CHECK(codes[0] == 0x10 && codes[1] == 0x3A && codes[31] == 0x76);
}

/* Eights of a block that are codes times 1, 1.25, 1.5 and 1.75 find these factors, and come back. */
static void check_fine_factors(void) {
  const char* recipe = "mxfp4-32/floor/mbs-search@8x2";
  char message[200];
  float x[32], back[32];
  uint8_t codes[16], scales[1], macros[1], blocks[17];
  tetromino_packed linear = {NULL, codes, scales, macros, NULL}, ggml = {blocks, NULL, NULL, NULL, NULL};
  tetromino_sizes sizes;
  int i;
  for (i = 0; i < 32; ++i) {
    const int code = i % 8 == 7 && i >= 16 ? 6 : i % 8; /* 6 * 1.5 would raise the scale */
    x[i] = steps[code] * (1.0f + (float)(i / 8) / 4.0f);
  }
  CHECK(tetromino_packed_sizes(recipe, 2, 33, &sizes, NULL, 0) == TETROMINO_OK);
  CHECK(sizes.codes == 2 * 32 && sizes.scales == 4 && sizes.macros == 4 && sizes.ggml == 0);
  CHECK(tetromino_packed_sizes("mxfp4-32/floor/mbs-search@16x2", 2, 33, &sizes, NULL, 0) == TETROMINO_OK);
  CHECK(sizes.scales == 4 && sizes.macros == 2);

  CHECK(tetromino_quantize(recipe, x, TETROMINO_FLOAT, 1, 32, NULL, &linear, message, sizeof message) == TETROMINO_OK);
  CHECK(macros[0] == 0xE4 && scales[0] == 127 && codes[0] == 0x10 && codes[7] == 0x76 && codes[15] == 0x66);
  CHECK(tetromino_dequantize(recipe, &linear, 1, 32, NULL, back, TETROMINO_FLOAT, NULL, 0) == TETROMINO_OK);
  CHECK(memcmp(x, back, sizeof x) == 0);
  CHECK(tetromino_quantize(recipe, x, TETROMINO_FLOAT, 1, 32, NULL, &ggml, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(strstr(message, "mxfp4-32 with macro blocks") != NULL);
}

/* NVFP4: a tensor scale of 0 is computed, any other kept. */
static void check_tensor_scale(void) {
  float x[64], back[64], scale = 0.0f;
  uint8_t blocks[36], again[36];
  tetromino_packed out;
  int i;
  memset(&out, 0, sizeof out);
  for (i = 0; i < 64; ++i) x[i] = 448.0f * steps[i % 8];
  out.ggml = blocks;
  out.tensor_scale = &scale;
  CHECK(tetromino_quantize("nvfp4/amax", x, TETROMINO_FLOAT, 1, 64, NULL, &out, NULL, 0) == TETROMINO_OK);
  CHECK(scale == 1.0f && blocks[0] == 0x7E && blocks[3] == 0x7E);
  CHECK(tetromino_dequantize("nvfp4/amax", &out, 1, 64, NULL, back, TETROMINO_FLOAT, NULL, 0) == TETROMINO_OK);
  CHECK(memcmp(x, back, sizeof x) == 0);
  out.tensor_scale = NULL;
  out.ggml = again;
  CHECK(tetromino_quantize("nvfp4/amax", x, TETROMINO_FLOAT, 1, 64, NULL, &out, NULL, 0) == TETROMINO_OK);
  CHECK(memcmp(blocks, again, sizeof blocks) == 0);
  scale = 2.0f;
  out.tensor_scale = &scale;
  CHECK(tetromino_quantize("nvfp4/amax", x, TETROMINO_FLOAT, 1, 64, NULL, &out, NULL, 0) == TETROMINO_OK);
  CHECK(scale == 2.0f && again[0] == 0x76); /* 224 */
}

static size_t tasks_run = 0;
static void run_backwards(void* user, size_t count, tetromino_task task, void* work) {
  size_t i;
  CHECK(user == &tasks_run);
  for (i = count; i > 0; --i) task(work, i - 1);
  tasks_run += count;
}

/* Work goes to the caller's threads, and column weights reach the search. */
static void check_options(void) {
  static float x[2048 * 32];
  static uint8_t plain[2048 * 17], threaded[2048 * 17], weighted[2048 * 17];
  float weights[32];
  tetromino_options options;
  tetromino_packed out;
  int i;
  unsigned state = 1;
  memset(&options, 0, sizeof options);
  memset(&out, 0, sizeof out);
  for (i = 0; i < 2048 * 32; ++i) {
    state = state * 1664525u + 1013904223u;
    x[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
  }
  for (i = 0; i < 32; ++i) weights[i] = i == 0 ? 1000.0f : 1.0f;
  out.ggml = plain;
  CHECK(tetromino_quantize("mxfp4-32/min-error", x, TETROMINO_FLOAT, 2048, 32, NULL, &out, NULL, 0) == TETROMINO_OK);
  options.run = run_backwards;
  options.user = &tasks_run;
  out.ggml = threaded;
  CHECK(tetromino_quantize("mxfp4-32/min-error", x, TETROMINO_FLOAT, 2048, 32, &options, &out, NULL, 0) == 0);
  CHECK(tasks_run > 0 && memcmp(plain, threaded, sizeof plain) == 0);
  options.column_weights = weights;
  out.ggml = weighted;
  CHECK(tetromino_quantize("mxfp4-32/min-error", x, TETROMINO_FLOAT, 2048, 32, &options, &out, NULL, 0) == 0);
  CHECK(memcmp(plain, weighted, sizeof plain) != 0);
}

/* What is wrong is said in words, cut to the buffer. */
static void check_errors(void) {
  char message[200], short_message[8];
  float x[64] = {0};
  uint8_t bytes[64];
  tetromino_packed out = {bytes, NULL, NULL, NULL, NULL};
  const float infinity = 1e30f * 1e30f;
  CHECK(tetromino_quantize("mxfp5", x, TETROMINO_FLOAT, 1, 64, NULL, &out, message, sizeof message) ==
        TETROMINO_UNKNOWN_NAME);
  CHECK(strstr(message, "unknown format \"mxfp5\"") != NULL);
  CHECK(tetromino_quantize("mxfp5", x, TETROMINO_FLOAT, 1, 64, NULL, &out, short_message, sizeof short_message) ==
        TETROMINO_UNKNOWN_NAME);
  CHECK(strcmp(short_message, "recipe ") == 0);
  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_FLOAT, 1, 33, NULL, &out, message, sizeof message) ==
        TETROMINO_SHAPE_MISMATCH);
  CHECK(tetromino_quantize("mxfp4-16/floor", x, TETROMINO_FLOAT, 1, 32, NULL, &out, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_INT64, 1, 32, NULL, &out, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(tetromino_quantize("mxfp4-32/floor", NULL, TETROMINO_FLOAT, 1, 32, NULL, &out, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(tetromino_quantize(NULL, x, TETROMINO_FLOAT, 1, 32, NULL, &out, NULL, 0) == TETROMINO_INVALID_ARGUMENT);
  x[40] = infinity;
  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_FLOAT, 2, 32, NULL, &out, message, sizeof message) ==
        TETROMINO_NON_FINITE);
  CHECK(strstr(message, "row 1") != NULL);
  out.ggml = NULL;
  CHECK(tetromino_quantize("mxfp4-32/floor", x, TETROMINO_FLOAT, 1, 32, NULL, &out, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(tetromino_packed_sizes("mxfp4-32/floor", (size_t)-1 / 8, 32, NULL, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
}

/* The example of DeepSeek EPLB's own documentation. */
static void check_eplb(void) {
  static const int32_t loads[24] = {90, 132, 40,  61, 104, 165, 39,  4,   73,  56, 183, 86,
                                    20, 107, 104, 64, 19,  197, 187, 157, 172, 86, 16,  27};
  static const int64_t published[32] = {5, 6,  5, 7, 8, 4,  3, 4, 10, 9, 10, 2, 0, 1, 11, 1,
                                        7, 10, 6, 8, 6, 11, 8, 9, 2,  4, 5,  1, 5, 0, 3,  1};
  const tetromino_cluster cluster = {2, 4, 2};
  int64_t expert_of_slot[32], slots_of_expert[2 * 12 * 5], copies[24];
  float as_float[24];
  char message[200];
  int i;
  CHECK(tetromino_balanced_eplb(loads, TETROMINO_INT32, 2, 12, 4, &cluster, expert_of_slot, slots_of_expert, copies,
                                message, sizeof message) == TETROMINO_OK);
  CHECK(memcmp(expert_of_slot, published, sizeof published) == 0);
  CHECK(copies[5] == 2 && slots_of_expert[5 * 5] == 0 && slots_of_expert[5 * 5 + 1] == 2);
  CHECK(slots_of_expert[5 * 5 + 2] == -1 && copies[0] == 1 && slots_of_expert[0] == 12);
  for (i = 0; i < 24; ++i) as_float[i] = (float)loads[i];
  memset(expert_of_slot, 0, sizeof expert_of_slot);
  CHECK(tetromino_balanced_eplb(as_float, TETROMINO_FLOAT, 2, 12, 4, &cluster, expert_of_slot, slots_of_expert, copies,
                                message, sizeof message) == TETROMINO_OK);
  CHECK(memcmp(expert_of_slot, published, sizeof published) == 0);
  memset(expert_of_slot, 0, sizeof expert_of_slot);
  CHECK(tetromino_balanced_eplb(loads, TETROMINO_INT32, 2, 12, 4, &cluster, expert_of_slot, NULL, NULL, message,
                                sizeof message) == TETROMINO_OK);
  CHECK(memcmp(expert_of_slot, published, sizeof published) == 0);
  as_float[3] = -1.0f;
  CHECK(tetromino_balanced_eplb(as_float, TETROMINO_FLOAT, 2, 12, 4, &cluster, expert_of_slot, slots_of_expert, copies,
                                message, sizeof message) == TETROMINO_INVALID_ARGUMENT);
  CHECK(strstr(message, "layer 0, expert 3") != NULL);
}

/* Two kinds of requests with experts of their own: each kind's experts share a node. */
static void check_local(void) {
  int32_t ids[64 * 2], expert_of_slot[8];
  uint32_t tokens[8], node_of_request[8];
  const tetromino_cluster cluster = {2, 2, 2};
  char message[200];
  int i, node_of_expert[8];
  for (i = 0; i < 8; ++i) tokens[i] = 8;
  for (i = 0; i < 64; ++i) { /* odd requests use odd experts */
    const int kind = i / 8 % 2;
    ids[2 * i] = 2 * (i % 4) + kind;
    ids[2 * i + 1] = 2 * ((i + 1) % 4) + kind;
  }
  CHECK(tetromino_local(ids, 1, 8, 2, tokens, 8, &cluster, expert_of_slot, node_of_request, message, sizeof message) ==
        TETROMINO_OK);
  for (i = 0; i < 8; ++i) node_of_expert[expert_of_slot[i]] = i / 4;
  for (i = 0; i < 8; ++i) {
    CHECK(node_of_expert[i] == node_of_expert[i % 2]);
    CHECK((int)node_of_request[i] == node_of_expert[i % 2]);
  }
  ids[7] = -1; /* padding */
  CHECK(tetromino_local(ids, 1, 8, 2, tokens, 8, &cluster, expert_of_slot, NULL, message, sizeof message) ==
        TETROMINO_OK);
  ids[7] = 8;
  CHECK(tetromino_local(ids, 1, 8, 2, tokens, 8, &cluster, expert_of_slot, NULL, message, sizeof message) ==
        TETROMINO_INVALID_ARGUMENT);
  CHECK(strstr(message, "got 8 in token 3") != NULL);
}

int main(void) {
  CHECK(strchr(tetromino_version(), '.') != NULL);
  check_blocks();
  check_fine_factors();
  check_tensor_scale();
  check_options();
  check_errors();
  check_eplb();
  check_local();
  if (failures == 0) printf("all is well with version %s\n", tetromino_version());
  return failures == 0 ? 0 : 1;
}
