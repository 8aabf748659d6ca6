"""Packs two rows from Python: the ten lines are those of examples/README.md. Usage: pack.py libtetromino.so"""
import array, ctypes, sys

library = ctypes.CDLL(sys.argv[1])
class Packed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ggml", "codes", "scales", "macros", "tensor_scale")]
rows, cols = 2, 64
x = array.array("f", [k % 7 - 3 for k in range(rows * cols)])
blocks, message = ctypes.create_string_buffer(rows * cols // 32 * 17), ctypes.create_string_buffer(200)
out = Packed(ggml=ctypes.addressof(blocks))
size = ctypes.c_size_t
if library.tetromino_quantize(b"mxfp4-32/min-error", ctypes.c_void_p(x.buffer_info()[0]), 0, size(rows), size(cols), None,
                              ctypes.byref(out), message, size(200)):
    sys.exit(message.value.decode())

back = array.array("f", bytes(4 * rows * cols))
status = library.tetromino_dequantize(b"mxfp4-32/min-error", ctypes.byref(out), size(rows), size(cols), None,
                                      ctypes.c_void_p(back.buffer_info()[0]), 0, message, size(200))
assert status == 0 and list(back) == list(x), (status, message.value)  # whole numbers to 4 are values of E2M1
