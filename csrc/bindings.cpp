// The pybind11 module _C: checks sizes, releases the GIL, turns errors into exceptions. No logic.
#include "bindings.h"

#include <sstream>

#include "arm_cores.h"
#include "attention.h"
#include "blocking.h"
#include "caches.h"
#include "chain_steps.h"
#include "cpu_features.h"
#include "huge_pages.h"
#include "parallel.h"
#include "portable.h"
#include "probe.h"
#include "round.h"
#include "smallest.h"
#include "sparse.h"

namespace {

uint8_t* bytes_of(const Pair& pair, size_t needed, const char* name) {
  if (needed && (!pair.first || pair.second < needed))
    throw std::invalid_argument(std::string(name) + ": has " + std::to_string(pair.second) + " bytes, needs " +
                                std::to_string(needed));
  return reinterpret_cast<uint8_t*>(pair.first);
}

Portable portable_of(const WeightShape& s, const Pair& qweight, const Pair& scale, const Pair& zero_point,
                     const Pair& minimum = {}, const Pair& order = {}, const Pair& book = {}, const Pair& levels = {}) {
  return {bytes_of(qweight, s.qweight_bytes(), "qweight"),
          bytes_of(scale, s.scale_bytes(), "scale"),
          bytes_of(zero_point, s.zero_point_bytes(), "zero_point"),
          bytes_of(minimum, s.minimum_bytes(), "minimum"),
          reinterpret_cast<uint8_t*>(order.first),
          reinterpret_cast<uint8_t*>(book.first),
          bytes_of(levels, s.levels_bytes(), "levels")};
}

// n rows of k elements of a dtype, `stride` elements apart.
DenseRows rows_of(const Pair& weight, int dtype, int64_t n, int64_t k, int64_t stride) {
  if (n < 1 || k < 1 || (n > 1 && (stride < k || stride > (int64_t{1} << 40) / n)))
    throw std::invalid_argument("stride=" + std::to_string(stride) + ": must be at least the row's length");
  const NybbleDtype kind = dtype_of(dtype);
  const size_t size = kind == NYBBLE_F32 ? 4 : 2;
  if (kind == NYBBLE_S32) throw std::invalid_argument("dtype: must be a float");
  return {bytes_of(weight, static_cast<size_t>((n - 1) * stride + k) * size, "weight"), stride, kind};
}

WeightShape weight_shape(int bits, int64_t n, int64_t k, int64_t group_size, bool symmetric, const std::string& layout,
                         int64_t block_n, int64_t block_k, bool ordered, int group_scale, bool minimum, bool book,
                         bool levels) {
  return shape_of(
      {bits, n, k, group_size, symmetric, layout, block_n, block_k, ordered, group_scale, minimum, book, levels});
}

py::list table() {
  py::list rows;
  for (const KernelEntry& e : kernel_table()) {
    py::dict row;
    row["name"] = e.name;
    row["op"] = e.op;
    row["scheme"] = e.scheme;
    row["target"] = e.target;
    row["layout"] = e.layout;
    row["panel"] = e.panel;
    row["block_rows"] = e.block_rows;
    row["columns"] = e.columns;
    row["decoded"] = e.decoded;
    row["decode_rows"] = e.decode_rows;
    row["least_rows"] = e.least_rows;
    row["built"] = e.built();
    rows.append(row);
  }
  return rows;
}

py::list cuda_table() {
  py::list rows;
  for (const CudaKernelEntry& e : cuda_kernel_table()) {
    py::dict row;
    row["name"] = e.name;
    row["scheme"] = e.scheme;
    row["target"] = e.target;
    row["layout"] = e.layout;
    row["min_m"] = e.min_m;
    row["max_m"] = e.max_m;
    row["built"] = e.built;
    rows.append(row);
  }
  return rows;
}

py::dict blocks(const std::string& kernel, const WeightShape& shape, int64_t rows, int threads,
                const std::optional<std::string>& sizes) {
  const KernelEntry& entry = find_kernel(kernel);
  if (!entry.linear || rows < 1 || threads < 1)
    throw std::invalid_argument("blocks: needs a linear kernel, and rows and threads of at least 1");
  const Cut cut = cut_for(product_of(entry, shape, rows, threads), sizes ? parse_caches(*sizes) : caches());
  py::dict row;
  row["chunk_rows"] = cut.chunk_rows;
  row["block_rows"] = cut.block_rows;
  row["k_block"] = cut.k_block;
  row["pass"] = cut.pass;
  row["pass_bytes"] = cut.pass_bytes;
  row["expand"] = cut.expand;
  row["one_stream"] = cut.one_stream;
  row["in_order"] = cut.in_order;
  row["decode"] = cut.decode;
  row["tile_parts"] = cut.tile_parts;
  row["block_parts"] = cut.block_parts;
  return row;
}

Strides3 strides_of(const std::tuple<int64_t, int64_t, int64_t>& strides) {
  return {std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

using Heads = std::tuple<Pair, std::tuple<int64_t, int64_t, int64_t>>;  // memory and strides of batch, head, token
using MaskOf = std::tuple<Pair, int, std::tuple<int64_t, int64_t, int64_t, int64_t>>;  // memory, kind, strides

void attention(const std::string& kernel, int dtype, const std::array<int64_t, 7>& sizes,
               const std::array<Heads, 4>& at, const std::optional<MaskOf>& mask, const Pair& slopes, float scale,
               bool causal, int64_t window, const std::optional<std::array<Heads, 2>>& scales,
               const std::string& kernel8, int threads) {
  AttentionCall call{};
  call.kernel = &find_kernel(kernel);
  if (!kernel8.empty()) call.kernel8 = &find_kernel(kernel8);
  call.dtype = dtype_of(dtype);
  std::tie(call.batch, call.heads, call.kv_heads, call.queries, call.keys, call.head_dim, call.value_dim) =
      std::tuple_cat(sizes);
  const auto place = [](const Heads& heads, Span& to, Strides3& strides) {
    to = span(std::get<0>(heads));
    strides = strides_of(std::get<1>(heads));
  };
  place(at[0], call.q, call.q_at);
  place(at[1], call.k, call.k_at);
  place(at[2], call.v, call.v_at);
  place(at[3], call.y, call.y_at);
  if (scales) {
    place((*scales)[0], call.k_scale, call.k_scale_at);
    place((*scales)[1], call.v_scale, call.v_scale_at);
  }
  if (mask) {
    call.mask = span(std::get<0>(*mask));
    call.mask_kind = std::get<1>(*mask);
    std::tie(call.mask_batch, call.mask_head, call.mask_query, call.mask_key) = std::get<2>(*mask);
  }
  call.slopes = span(slopes);
  call.scale = scale;
  call.causal = causal;
  call.window = window;
  py::gil_scoped_release release;
  run_attention(call, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  if (watch_forks() != 0) throw std::runtime_error("pthread_atfork failed");
  m.attr("version") = NYBBLE_VERSION;
  m.def("kernel_table", &table);
  m.def("cuda_kernel_table", &cuda_table);
  m.def("cpu", [](bool tiles) {
    const CpuFeatures cpu = detect_cpu(tiles);
    return py::make_tuple(cpu.brand, cpu.features, cpu.refused);
  });
  m.def(
      "cpu_features_of",
      [](uint32_t one_c, uint32_t seven_b, uint32_t seven_c, uint32_t seven_d, uint32_t seven1_a, uint64_t saved_state,
         const py::function& ask_for_tiles) {
        const CpuFeatures cpu = features_of({one_c, seven_b, seven_c, seven_d, seven1_a, saved_state},
                                            [&] { return ask_for_tiles().cast<int>(); });
        return py::make_tuple(cpu.features, cpu.refused);
      },
      py::kw_only(), py::arg("one_c"), py::arg("seven_b"), py::arg("seven_c"), py::arg("seven_d"), py::arg("seven1_a"),
      py::arg("saved_state"), py::arg("ask_for_tiles"));

  m.def("cpu_features_of_arm", &features_of_arm, py::kw_only(), py::arg("hwcap"), py::arg("hwcap2"));

  m.def(
      "arm_cores",
      [](const std::string& cpuinfo) {
        std::istringstream lines(cpuinfo);
        return arm_cores(lines);
      },
      py::arg("cpuinfo"));

  m.def("listed_caches", &listed_caches, py::arg("cpus"));
  m.def("caches", [] {
    const Caches& of = caches();
    return py::make_tuple(of.l1, of.l2, of.l3);
  });
  m.def("blocks", &blocks, py::arg("kernel"), py::arg("shape"), py::kw_only(), py::arg("rows"), py::arg("threads"),
        py::arg("caches") = py::none());
  m.def("dense_layouts", [] {
    std::vector<std::tuple<std::string, int, bool, bool>> rows;
    for (const LayoutRow& row : layouts_of(Form::dense)) rows.emplace_back(row.name, row.bits, row.grouped, row.paired);
    return rows;
  });
  m.def("probes", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const ProbeEntry& e : probe_table()) rows.emplace_back(e.name, e.kind, e.why_not);
    return rows;
  });
  m.def(
      "probe",
      [](const std::string& name, int threads, uint64_t amount, int64_t passes, int runs, bool huge_pages) {
        py::gil_scoped_release release;
        const ProbeResult result = run_probe({name, threads, amount, passes, runs, huge_pages});
        return std::make_pair(result.seconds, result.work);
      },
      py::arg("name"), py::kw_only(), py::arg("threads"), py::arg("amount"), py::arg("passes") = 1, py::arg("runs") = 1,
      py::arg("huge_pages") = false);

  m.attr("F32") = static_cast<int>(NYBBLE_F32);
  m.attr("BF16") = static_cast<int>(NYBBLE_BF16);
  m.attr("F16") = static_cast<int>(NYBBLE_F16);
  m.attr("S32") = static_cast<int>(NYBBLE_S32);
  m.attr("S8") = static_cast<int>(NYBBLE_S8);  // of keys and values only
  m.attr("BOOL") = kBool;                      // of masks only

  py::class_<WeightShape>(m, "WeightShape")
      .def(py::init(&weight_shape), py::kw_only(), py::arg("bits"), py::arg("n"), py::arg("k"), py::arg("group_size"),
           py::arg("symmetric"), py::arg("layout"), py::arg("block_n"), py::arg("block_k"), py::arg("ordered"),
           py::arg("group_scale") = static_cast<int>(NYBBLE_BF16), py::arg("minimum") = false, py::arg("book") = false,
           py::arg("levels") = false)
      .def_property_readonly("packed_bytes", [](const WeightShape& s) { return sections_of(s).total; });

  m.def("pack",
        [](const WeightShape& s, const Pair& qweight, const Pair& scale, const Pair& zero_point, const Pair& minimum,
           const Pair& order, const Pair& book, const Pair& levels, const Pair& packed, int threads) {
          bytes_of(order, s.order_bytes(), "order");
          bytes_of(book, s.book_bytes(), "book");
          const Portable from = portable_of(s, qweight, scale, zero_point, minimum, order, book, levels);
          uint8_t* to = bytes_of(packed, sections_of(s).total, "packed");
          py::gil_scoped_release release;
          pack(s, from, to, threads);
        });
  m.def("use_huge_pages", [](const std::vector<Pair>& memory) {
    py::gil_scoped_release release;
    use_huge_pages(memory);
  });
  m.def("unpack",
        [](const WeightShape& s, const Pair& packed, const Pair& qweight, const Pair& scale, const Pair& zero_point,
           const Pair& minimum, const Pair& order, const Pair& book, const Pair& levels, int threads) {
          bytes_of(order, s.order_bytes(), "order");
          bytes_of(book, s.book_bytes(), "book");
          const uint8_t* from = bytes_of(packed, sections_of(s).total, "packed");
          const Portable to = portable_of(s, qweight, scale, zero_point, minimum, order, book, levels);
          py::gil_scoped_release release;
          unpack(s, from, to, threads);
        });
  m.def("all_finite", [](const Pair& weight, int dtype, int64_t n, int64_t k, int64_t stride, int threads) {
    const DenseRows rows = rows_of(weight, dtype, n, k, stride);
    py::gil_scoped_release release;
    return all_finite(n, k, rows, threads);
  });
  m.def("round_weight", [](const WeightShape& s, const Pair& weight, int dtype, int64_t stride, const Pair& qweight,
                           const Pair& scale, const Pair& zero_point, int threads) {
    const DenseRows from = rows_of(weight, dtype, s.n, s.k, stride);
    const Portable to = portable_of(s, qweight, scale, zero_point);
    py::gil_scoped_release release;
    return round_weight(s, from, to, threads);
  });
  m.def("squared_sums", [](const WeightShape& s, const Pair& weight, int dtype, int64_t stride, const Pair& qweight,
                           const Pair& scale, const Pair& zero_point, const Pair& minimum, int threads) {
    const DenseRows from = rows_of(weight, dtype, s.n, s.k, stride);
    const Portable rounded = portable_of(s, qweight, scale, zero_point, minimum);
    py::gil_scoped_release release;
    const SquaredSums sums = squared_sums(s, from, rounded, threads);
    return std::make_pair(sums.signal, sums.noise);
  });
  m.def("check_kept", [](const WeightShape& s, const Pair& qweight, int64_t most, int64_t of, int threads) {
    if (of < 1) throw std::invalid_argument("of=" + std::to_string(of) + ": must be at least 1");
    const uint8_t* codes = bytes_of(qweight, s.qweight_bytes(), "qweight");
    py::gil_scoped_release release;
    check_kept(s, codes, most, of, threads);
  });
  m.def("keep_only", [](const Pair& from, const Pair& keep, int64_t count, int64_t size, const Pair& to, int threads) {
    if (count < 1 || count > int64_t{1} << 40 || (size != 2 && size != 4))
      throw std::invalid_argument("count=" + std::to_string(count) + ", size=" + std::to_string(size) +
                                  ": must be in [1, 2^40], and 2 or 4");
    const size_t total = static_cast<size_t>(count);
    const uint8_t *weights = bytes_of(from, total * size, "from"), *mask = bytes_of(keep, total, "keep");
    uint8_t* kept = bytes_of(to, total * size, "to");
    py::gil_scoped_release release;
    keep_only(weights, mask, count, size, kept, threads);
  });
  m.def("choose_smallest", [](const Pair& scores, const Pair& counts, int64_t n, int64_t k, const Pair& chosen,
                              int threads) {
    if (n < 1 || k < 1 || k > (int64_t{1} << 40) / n)
      throw std::invalid_argument("k=" + std::to_string(k) + ": n and k must be at least 1, n * k at most 2^40");
    const size_t total = static_cast<size_t>(n * k);
    const float* from = reinterpret_cast<const float*>(bytes_of(scores, total * 4, "scores"));
    const int64_t* each = reinterpret_cast<const int64_t*>(bytes_of(counts, static_cast<size_t>(n) * 8, "counts"));
    uint8_t* to = bytes_of(chosen, total, "chosen");
    py::gil_scoped_release release;
    choose_smallest(from, each, n, k, to, threads);
  });
  py::class_<SparsePack>(m, "SparsePack")
      .def(py::init([](const WeightShape& s, const Pair& qweight, const Pair& scale, int threads) {
             const Portable from = portable_of(s, qweight, scale, {0, 0});
             py::gil_scoped_release release;
             return std::make_unique<SparsePack>(s, from, threads);
           }),
           py::arg("shape"), py::arg("qweight"), py::arg("scale"), py::arg("threads"))
      .def_property_readonly("nbytes", &SparsePack::bytes)
      .def("write", [](const SparsePack& pack, const Pair& packed) {
        uint8_t* to = bytes_of(packed, pack.bytes(), "packed");
        py::gil_scoped_release release;
        pack.write(to);
      });
  m.def("check_packed", [](const WeightShape& s, const Pair& packed) {
    check_packed(s, bytes_of(packed, 0, "packed"), packed.second);
  });
  m.def("unpack_sparse",
        [](const WeightShape& s, const Pair& packed, const Pair& qweight, const Pair& scale, int threads) {
          const Portable to = portable_of(s, qweight, scale, {0, 0});
          py::gil_scoped_release release;
          unpack_sparse(s, reinterpret_cast<const uint8_t*>(packed.first), packed.second, to, threads);
        });
  m.def("count_kept", [](const WeightShape& s, const Pair& qweight) {
    return count_kept(s, bytes_of(qweight, s.qweight_bytes(), "qweight"));
  });
  m.def("to_bitmask", [](const WeightShape& s, const Pair& qweight, const Pair& mask, const Pair& values) {
    const uint8_t* from = bytes_of(qweight, s.qweight_bytes(), "qweight");
    const int64_t kept = count_kept(s, from);
    const size_t needed = static_cast<size_t>(s.bits == 8 ? kept : (kept + 1) / 2);
    to_bitmask(s, from,
               {bytes_of(mask, static_cast<size_t>(s.n * ((s.k + 7) / 8)), "mask"), bytes_of(values, needed, "values"),
                needed});
  });
  m.def("from_bitmask",
        [](const WeightShape& s, const Pair& mask, const Pair& values, int64_t most, int64_t of, const Pair& qweight) {
          from_bitmask(s,
                       {bytes_of(mask, static_cast<size_t>(s.n * ((s.k + 7) / 8)), "mask"),
                        reinterpret_cast<uint8_t*>(values.first), values.second},
                       most, of, bytes_of(qweight, s.qweight_bytes(), "qweight"));
        });
  m.def("check_blocks", [](const Pair& start, const Pair& index, int64_t width) {
    const int64_t strips = static_cast<int64_t>(start.second / 4) - 1, blocks = static_cast<int64_t>(index.second / 4);
    if (strips < 0) throw std::invalid_argument("block_start: is empty");
    check_blocks(reinterpret_cast<const int32_t*>(start.first), strips, reinterpret_cast<const int32_t*>(index.first),
                 blocks, width);
  });
  m.def(
      "prepare",
      [](const std::string& kernel, int panel_format, int dtype, const Pair& x, int64_t rows, int64_t stride, int64_t k,
         int64_t k_padded, int64_t block_rows, int64_t group, const Pair& panel, const Pair& scale, const Pair& zero,
         const Pair& sums, float given_scale, int32_t given_zero, int act_steps, const Pair& order) {
        run_prepare({&find_kernel(kernel),
                     static_cast<NybblePanel>(panel_format),
                     dtype_of(dtype),
                     span(x),
                     rows,
                     stride,
                     k,
                     k_padded,
                     block_rows,
                     group,
                     span(panel),
                     span(scale),
                     span(zero),
                     span(sums),
                     {given_scale, given_zero},
                     act_steps,
                     span(order)});
      },
      py::kw_only(), py::arg("kernel"), py::arg("panel_format"), py::arg("dtype"), py::arg("x"), py::arg("rows"),
      py::arg("stride"), py::arg("k"), py::arg("k_padded"), py::arg("block_rows"), py::arg("group"), py::arg("panel"),
      py::arg("scale"), py::arg("zero"), py::arg("sums"), py::arg("given_scale") = 0.0f, py::arg("given_zero") = 0,
      py::arg("act_steps") = 255, py::arg("order") = Pair{});

  m.def("attention", &attention, py::arg("kernel"), py::arg("dtype"), py::arg("sizes"), py::arg("at"), py::arg("mask"),
        py::arg("slopes"), py::arg("scale"), py::arg("causal"), py::arg("window"), py::arg("scales"),
        py::arg("kernel8"), py::arg("threads"));

  py::class_<LinearPlan>(m, "LinearPlan")
      .def(py::init<const std::string&, const std::string&, const std::string&, const std::string&, const WeightShape&,
                    bool, int, int64_t, int64_t>(),
           py::arg("kernel"), py::arg("prepare"), py::arg("expand"), py::arg("few"), py::arg("shape"),
           py::arg("static_activations"), py::arg("act_steps"), py::arg("first_row") = 0, py::arg("all_rows") = 0)
      .def("run", &LinearPlan::run);
  bind_chain(m);
  bind_recurrent(m);
  bind_experts(m);
  bind_lookup(m);
  bind_conv(m);
  bind_codes(m);
}
