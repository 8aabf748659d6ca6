#pragma once

/// The C interface of c.h. One source file defines TETROMINO_C_INSTANCE and includes this header: see cmake/c.cmake.
#if defined(TETROMINO_C_INSTANCE)

#include "../c.h"
#include "../cpu.hpp"               // cpu
#include "../layout/ggml_rows.hpp"  // try_quantize_to, try_from_ggml
#include "../moe/place_local.hpp"   // try_local
#include "../moe/place.hpp"         // try_balanced_eplb, try_to_loads
#include "../version.hpp"           // TETROMINO_VERSION_MAJOR
#include "sizes.hpp"                // check_sizes

#include <algorithm>    // std::copy, std::min
#include <atomic>       // std::atomic
#include <cstring>      // std::memcpy
#include <exception>    // std::exception_ptr
#include <new>          // std::bad_alloc
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::detail {

inline tetromino_status status_of(errc code) noexcept {
  switch (code) {
    case errc::invalid_argument:
      return TETROMINO_INVALID_ARGUMENT;
    case errc::shape_mismatch:
      return TETROMINO_SHAPE_MISMATCH;
    case errc::non_finite:
      return TETROMINO_NON_FINITE;
    case errc::unknown_name:
      return TETROMINO_UNKNOWN_NAME;
    case errc::infeasible:
      return TETROMINO_INFEASIBLE;
    default:
      return TETROMINO_FAILED;
  }
}

/// Where a call leaves its words.
struct message_buffer {
  char* data;
  std::size_t size;

  void set(std::string_view text) const noexcept {
    if (data == nullptr || size == 0) return;
    const std::size_t length = std::min(text.size(), size - 1);
    std::memcpy(data, text.data(), length);
    data[length] = '\0';
  }
};

/// Runs a call that returns result<void>, and turns its errors and exceptions into a status.
template <class Call>
tetromino_status answer(message_buffer message, const Call& call) noexcept {
  message.set("");
  try {
    const result<void> done = call();
    if (done) return TETROMINO_OK;
    message.set(done.error().what());
    return status_of(done.error().code());
  } catch (const error& e) {
    message.set(e.what());
    return status_of(e.code());
  } catch (const std::bad_alloc&) {
    message.set("out of memory");
    return TETROMINO_NO_MEMORY;
  } catch (const std::exception& e) {
    message.set(e.what());
  } catch (...) {
    message.set("an exception that is not a std::exception");
  }
  return TETROMINO_FAILED;
}

inline result<void> expect_given(bool is_given, std::string_view what) {
  if (is_given) return {};
  return error(errc::invalid_argument, {"expected ", what, ", got NULL"});
}

/// A caller's threads. Tasks must not throw into the caller's code, which may be C: the first exception waits here.
class borrowed_threads {
 public:
  explicit borrowed_threads(const tetromino_options& options) noexcept : run_(options.run), user_(options.user) {}

  void operator()(std::size_t count, task_ref task) {
    struct work {
      const task_ref* task;
      std::exception_ptr failure;
      std::atomic<bool> failed{false};
    } shared{&task, nullptr};
    const tetromino_task one = [](void* context, std::size_t index) {
      auto& mine = *static_cast<work*>(context);
      try {
        if (!mine.failed.load(std::memory_order_relaxed)) (*mine.task)(index);
      } catch (...) {
        if (!mine.failed.exchange(true)) mine.failure = std::current_exception();
      }
    };
    run_(user_, count, one, &shared);
    if (shared.failure) std::rethrow_exception(shared.failure);
  }

  /// tetromino::cpu on these threads, or on the calling one where there are none.
  [[nodiscard]] cpu_t policy() noexcept { return run_ == nullptr ? cpu : cpu.on(*this); }

 private:
  tetromino_run run_;
  void* user_;
};

/// Calls f(T{}) for the element type of rows.
template <class F>
result<void> with_element(tetromino_type type, const F& f) {
  switch (type) {
    case TETROMINO_FLOAT:
      return f(float{});
    case TETROMINO_HALF:
      return f(half{});
    case TETROMINO_BFLOAT16:
      return f(bfloat16{});
    default:
      return error(errc::invalid_argument, {"rows are of float, half or bfloat16, got type ", static_cast<int>(type)});
  }
}

/// A recipe and the shape of the rows that it packs.
struct c_shape {
  recipe way;
  packed_shape packed;

  static result<c_shape> make(const char* name, std::size_t rows, std::size_t cols) {
    if (auto given = expect_given(name != nullptr, "the name of a recipe"); !given) return given.error();
    const auto way = recipe::try_parse(name);
    if (!way) return way.error();
    if (auto fits = check_sizes(1, rows, cols); !fits) return fits.error();  // buffers are computed from these
    return c_shape{*way, {way->format, 1, rows, cols}};
  }
};

/// A caller's buffers as a view. The tensor scale of NVFP4 without one is `one`.
inline result<packed_view<any_format, std::uint8_t>> view_of(const packed_shape& shape, const tetromino_packed& in,
                                                             float& one) {
  const bool has_codes =
      in.codes != nullptr && in.scales != nullptr && (in.macros != nullptr || shape.macro_bytes() == 0);
  if (auto given = expect_given(has_codes, "ggml blocks, or codes, scales and what macro bytes the recipe has");
      !given) {
    return given.error();
  }
  packed_view<any_format, std::uint8_t> out{shape.format, 1, shape.rows, shape.cols};
  out.codes = {in.codes, shape.code_bytes()};
  out.scales = {in.scales, shape.scale_bytes()};
  out.macros = {in.macros, shape.macro_bytes()};
  if (shape.format.scale == scale_type::e4m3)
    out.tensor_scales = {in.tensor_scale == nullptr ? &one : in.tensor_scale, 1};
  return out;
}

/// Options with what a C caller may choose. A tensor scale that is there already is kept.
inline quantize_options options_for(const c_shape& shape, const tetromino_options& chosen, const float& tensor_scale) {
  quantize_options out;
  if (chosen.column_weights != nullptr) out.column_weights = {chosen.column_weights, shape.packed.cols};
  if (shape.packed.format.scale == scale_type::e4m3 && tensor_scale != 0) out.tensor_scales = {&tensor_scale, 1};
  return out;
}

template <real T>
result<void> quantize_rows(const cpu_t& policy, const T* x, const c_shape& shape, const tetromino_options& chosen,
                           const tetromino_packed& out) {
  float tensor_scale = out.tensor_scale == nullptr ? 1.0f : *out.tensor_scale;
  const matrix_view<const T> in(x, shape.packed.rows, shape.packed.cols);
  if (out.ggml == nullptr) {
    auto view = view_of(shape.packed, out, tensor_scale);
    if (!view) return view.error();
    const float given = tensor_scale;
    return try_quantize_to(policy, in, shape.way, *view, options_for(shape, chosen, given));
  }
  const auto bytes = layout::try_ggml_bytes(shape.packed);
  if (!bytes) return bytes.error();
  layout::ggml_rows to{{static_cast<std::uint8_t*>(out.ggml), *bytes}};
  const bool is_asked = shape.packed.format.scale == scale_type::e4m3 && tensor_scale == 0;
  if (is_asked) to.tensor_scales = {out.tensor_scale, 1};
  return try_quantize_to(policy, in, shape.way, to, options_for(shape, chosen, tensor_scale));
}

template <real T>
result<void> dequantize_rows(const cpu_t& policy, const c_shape& shape, const tetromino_packed& in, T* x) {
  float one = 1.0f;
  const matrix_view<T> out(x, shape.packed.rows, shape.packed.cols);
  if (in.ggml == nullptr) {
    const auto view = view_of(shape.packed, in, one);
    if (!view) return view.error();
    return try_dequantize_to(policy, *view, batch_view<T>(out));
  }
  const auto bytes = layout::try_ggml_bytes(shape.packed);
  if (!bytes) return bytes.error();
  packed<any_format> linear(shape.packed.format, 1, shape.packed.rows, shape.packed.cols);
  if (auto read = layout::try_from_ggml({static_cast<const std::uint8_t*>(in.ggml), *bytes}, linear.view()); !read) {
    return read;
  }
  for (float& scale : linear.tensor_scales) scale = in.tensor_scale == nullptr ? 1.0f : *in.tensor_scale;
  return try_dequantize_to(policy, linear, batch_view<T>(out));
}

/// Calls f(values) for loads of any type.
template <class F>
result<void> with_loads(const void* loads, tetromino_type type, std::size_t count, const F& f) {
  switch (type) {
    case TETROMINO_FLOAT:
      return f(std::span(static_cast<const float*>(loads), count));
    case TETROMINO_DOUBLE:
      return f(std::span(static_cast<const double*>(loads), count));
    case TETROMINO_INT64:
      return f(std::span(static_cast<const std::int64_t*>(loads), count));
    case TETROMINO_INT32:
      return f(std::span(static_cast<const std::int32_t*>(loads), count));
    default:
      return error(errc::invalid_argument,
                   {"loads are float, double, int64 or int32, got type ", static_cast<int>(type)});
  }
}

/// What tetromino_balanced_eplb writes; null is not wanted.
struct eplb_tensors {
  std::int64_t* physical_to_logical;
  std::int64_t* logical_to_physical;
  std::int64_t* copies;
};

inline result<void> write_eplb(const moe::load_view& loads, std::size_t groups, const tetromino_cluster& cluster,
                               const eplb_tensors& out) {
  const auto shape = moe::topology::try_uniform(cluster.nodes, cluster.gpus_per_node, cluster.slots_per_gpu);
  if (!shape) return shape.error();
  const auto tensors = moe::try_balanced_eplb(loads, {shape->slots(), groups, shape->nodes(), shape->gpus()});
  if (!tensors) return tensors.error();
  std::copy(tensors->physical_to_logical.begin(), tensors->physical_to_logical.end(), out.physical_to_logical);
  if (out.copies != nullptr) std::copy(tensors->count.begin(), tensors->count.end(), out.copies);
  if (out.logical_to_physical == nullptr) return {};
  const std::size_t width = tensors->slots - tensors->experts + 1, copies = tensors->max_copies;
  std::fill_n(out.logical_to_physical, tensors->layers * tensors->experts * width, std::int64_t{-1});
  for (std::size_t row = 0; row < tensors->layers * tensors->experts; ++row) {
    std::copy_n(tensors->logical_to_physical.begin() + static_cast<std::ptrdiff_t>(row * copies), copies,
                out.logical_to_physical + row * width);
  }
  return {};
}

/// Recorded ids of requests that follow each other.
inline result<moe::trace> trace_of(const std::int32_t* ids, const moe::routing_shape& shape,
                                   std::span<const std::uint32_t> request_tokens) {
  std::vector<moe::request> requests;
  std::uint64_t tokens = 0;
  for (const std::uint32_t n : request_tokens) {
    requests.push_back({tokens, n, 0, 0});
    tokens += n;
  }
  if (auto fits = check_sizes(tokens, shape.layers, shape.experts_per_token); !fits) return fits.error();
  return moe::trace::try_make(shape, std::span(ids, tokens * shape.ids_per_token()), std::move(requests));
}

}  // namespace TETROMINO_NAMESPACE::detail

#define TETROMINO_C_TEXT(x) #x
#define TETROMINO_C_VERSION(major, minor, patch) \
  TETROMINO_C_TEXT(major) "." TETROMINO_C_TEXT(minor) "." TETROMINO_C_TEXT(patch)

const char* tetromino_version(void) {
  return TETROMINO_C_VERSION(TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR, TETROMINO_VERSION_PATCH);
}

tetromino_status tetromino_packed_sizes(const char* recipe, size_t rows, size_t cols, tetromino_sizes* out,
                                        char* message, size_t message_size) {
  namespace d = tetromino::detail;
  return d::answer({message, message_size}, [&]() -> tetromino::result<void> {
    if (auto given = d::expect_given(out != nullptr, "a place for the sizes"); !given) return given;
    const auto shape = d::c_shape::make(recipe, rows, cols);
    if (!shape) return shape.error();
    const auto& packed = shape->packed;
    const auto ggml = tetromino::layout::try_ggml_bytes(packed);
    *out = {packed.code_bytes(), packed.scale_bytes(), packed.macro_bytes(), ggml ? *ggml : 0};
    return {};
  });
}

tetromino_status tetromino_quantize(const char* recipe, const void* x, tetromino_type type, size_t rows, size_t cols,
                                    const tetromino_options* options, const tetromino_packed* out, char* message,
                                    size_t message_size) {
  namespace d = tetromino::detail;
  return d::answer({message, message_size}, [&]() -> tetromino::result<void> {
    if (auto given = d::expect_given(x != nullptr && out != nullptr, "rows and a place for them"); !given) return given;
    const auto shape = d::c_shape::make(recipe, rows, cols);
    if (!shape) return shape.error();
    const tetromino_options chosen = options == nullptr ? tetromino_options{} : *options;
    d::borrowed_threads threads(chosen);
    return d::with_element(type, [&]<class T>(T) {
      return d::quantize_rows(threads.policy(), static_cast<const T*>(x), *shape, chosen, *out);
    });
  });
}

tetromino_status tetromino_dequantize(const char* recipe, const tetromino_packed* in, size_t rows, size_t cols,
                                      const tetromino_options* options, void* out, tetromino_type type, char* message,
                                      size_t message_size) {
  namespace d = tetromino::detail;
  return d::answer({message, message_size}, [&]() -> tetromino::result<void> {
    if (auto given = d::expect_given(in != nullptr && out != nullptr, "rows and a place for them"); !given)
      return given;
    const auto shape = d::c_shape::make(recipe, rows, cols);
    if (!shape) return shape.error();
    d::borrowed_threads threads(options == nullptr ? tetromino_options{} : *options);
    return d::with_element(
        type, [&]<class T>(T) { return d::dequantize_rows(threads.policy(), *shape, *in, static_cast<T*>(out)); });
  });
}

tetromino_status tetromino_balanced_eplb(const void* loads, tetromino_type type, size_t layers, size_t experts,
                                         size_t groups, const tetromino_cluster* cluster, int64_t* physical_to_logical,
                                         int64_t* logical_to_physical, int64_t* copies, char* message,
                                         size_t message_size) {
  namespace d = tetromino::detail;
  return d::answer({message, message_size}, [&]() -> tetromino::result<void> {
    const d::eplb_tensors out{physical_to_logical, logical_to_physical, copies};
    const bool is_given = loads && cluster && physical_to_logical;
    if (auto given = d::expect_given(is_given, "loads, a cluster and a place for experts of slots"); !given)
      return given;
    if (auto fits = d::check_sizes(1, layers, experts); !fits) return fits;
    return d::with_loads(loads, type, layers * experts, [&](auto values) -> tetromino::result<void> {
      const auto table = tetromino::moe::try_to_loads(layers, experts, values);
      return table ? d::write_eplb(*table, groups, *cluster, out) : table.error();
    });
  });
}

tetromino_status tetromino_local(const int32_t* ids, size_t layers, size_t experts, size_t experts_per_token,
                                 const uint32_t* request_tokens, size_t requests, const tetromino_cluster* cluster,
                                 int32_t* slot_to_expert, uint32_t* node_of_request, char* message,
                                 size_t message_size) {
  namespace d = tetromino::detail;
  namespace moe = tetromino::moe;
  return d::answer({message, message_size}, [&]() -> tetromino::result<void> {
    const bool is_given = ids && request_tokens && cluster && slot_to_expert;
    if (auto given = d::expect_given(is_given, "ids, requests, a cluster and a placement"); !given) return given;
    const auto recorded = d::trace_of(ids, {layers, experts, experts_per_token}, {request_tokens, requests});
    if (!recorded) return recorded.error();
    const auto shape = moe::topology::try_uniform(cluster->nodes, cluster->gpus_per_node, cluster->slots_per_gpu);
    if (!shape) return shape.error();
    const auto plan = moe::try_local(recorded->view(), *shape);
    if (!plan) return plan.error();
    const auto slots = plan->experts.slot_to_expert();
    std::copy(slots.begin(), slots.end(), slot_to_expert);
    if (node_of_request != nullptr) {
      std::copy(plan->source_of_request.begin(), plan->source_of_request.end(), node_of_request);
    }
    return {};
  });
}

#endif
