#include <tetromino/c.h>

#include <stdio.h>

/* Packs rows into ggml's blocks by the installed library, and reads them back. */
int main(void) {
  float x[2 * 64], back[2 * 64];
  unsigned char blocks[2 * 2 * 17];
  char message[200];
  tetromino_packed out = {0};
  int i, wrong = 0;
  for (i = 0; i < 2 * 64; ++i) x[i] = (float)(i % 7 - 3);
  out.ggml = blocks;
  if (tetromino_quantize("mxfp4-32/min-error", x, TETROMINO_FLOAT, 2, 64, NULL, &out, message, sizeof message) !=
          TETROMINO_OK ||
      tetromino_dequantize("mxfp4-32/min-error", &out, 2, 64, NULL, back, TETROMINO_FLOAT, message, sizeof message) !=
          TETROMINO_OK) {
    printf("%s\n", message);
    return 1;
  }
  for (i = 0; i < 2 * 64; ++i) wrong += x[i] != back[i];
  printf("tetromino::c %s: %d of 128 numbers differ\n", tetromino_version(), wrong);
  return wrong != 0;
}
