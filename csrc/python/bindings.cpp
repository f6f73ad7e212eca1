// Python's view of the C interface: arrays come in as DLPack (torch, NumPy, JAX, CuPy) or as a plain tuple
// (address, dtype, device, device index, sizes, strides), nothing is copied, and no array library is linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"
#include "flora_kernels.h"

namespace py = pybind11;

namespace {

// One argument: where it lies, and what keeps it alive.
struct Array {
    void *data = nullptr;
    int32_t dtype = 0, device = FLORA_CPU, device_index = 0;
    std::vector<int64_t> sizes, strides;
    py::object owner;
};

[[noreturn]] void refuse(const std::string &name, const std::string &why) {
    throw py::value_error(name + " " + why);
}

int32_t dtype_of(const std::string &name, const DLDataType &type, int32_t uint16_is) {
    if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return FLORA_FP32;
    if (type.lanes == 1 && type.code == kDLFloat && type.bits == 64) return FLORA_FP64;
    if (type.lanes == 1 && type.code == kDLFloat && type.bits == 16) return FLORA_FP16;
    if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return FLORA_BF16;
    if (type.lanes == 1 && type.code == kDLInt && type.bits == 16) return FLORA_INT16;
    if (type.lanes == 1 && type.code == kDLUInt && type.bits == 16) {
        if (uint16_is) return uint16_is;
        throw py::type_error(name + " is uint16: say with dtype= (wgrad: uint16=) 'bfloat16' or 'float16' what its bits are");
    }
    static const char *const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    std::string kind = type.code < 7 ? kinds[type.code] : "DLPack type " + std::to_string(type.code) + " of bits ";
    throw py::type_error(name + " must be float32, float64, float16, bfloat16 or int16 (low bits), got " + kind +
                         std::to_string(type.bits) + "; convert it");
}

void take_tensor(const std::string &name, const DLTensor &tensor, int32_t uint16_is, Array &array) {
    array.data = static_cast<char *>(tensor.data) + tensor.byte_offset;
    array.dtype = dtype_of(name, tensor.dtype, uint16_is);
    if (tensor.device.device_type == kDLCPU || tensor.device.device_type == kDLCUDAHost) array.device = FLORA_CPU;
    else if (tensor.device.device_type == kDLCUDA) array.device = FLORA_CUDA;
    else refuse(name, "must be on the CPU or a CUDA device, got DLPack device " +
                          std::to_string(tensor.device.device_type));
    array.device_index = array.device == FLORA_CUDA ? tensor.device.device_id : 0;
    array.sizes.assign(tensor.shape, tensor.shape + tensor.ndim);
    array.strides.resize(array.sizes.size());
    int64_t step = 1;
    for (size_t i = array.sizes.size(); i-- > 0; step *= array.sizes[i])
        array.strides[i] = tensor.strides ? tensor.strides[i] : step;
}

// `stream`: the consumer's, for a CUDA array; its producer makes it wait for what writes the array. 0 is the default.
py::object capsule_of(const std::string &name, py::handle object, bool written, uintptr_t stream) {
    // JAX hands out its immutable arrays without saying so.
    std::string module = py::str(py::type::of(object).attr("__module__"));
    if (written && (module == "jaxlib" || module.rfind("jaxlib.", 0) == 0 || module.rfind("jax.", 0) == 0))
        throw py::type_error(name + " is written in place, and JAX arrays are immutable; use the XLA FFI handler "
                                    "(docs/embedding.md)");
    py::dict options;
    try {
        if (stream && object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int32_t>() == kDLCUDA)
            options["stream"] = stream;
        try {
            return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **options);
        } catch (py::error_already_set &error) {
            if (!error.matches(PyExc_TypeError)) throw;
            return object.attr("__dlpack__")(**options);
        }
    } catch (py::error_already_set &error) {
        throw py::value_error(name + " cannot be shared: " + error.what());
    }
}

Array from_dlpack(const std::string &name, py::handle object, bool written, int32_t uint16_is, uintptr_t stream) {
    Array array;
    array.owner = capsule_of(name, object, written, stream);
    PyObject *capsule = array.owner.ptr();
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        auto *managed = static_cast<DLManagedTensorVersioned *>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
        if (written && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY))
            refuse(name, "is read-only and would be written; pass a writable array");
        take_tensor(name, managed->dl_tensor, uint16_is, array);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        take_tensor(name, static_cast<DLManagedTensor *>(PyCapsule_GetPointer(capsule, "dltensor"))->dl_tensor,
                    uint16_is, array);
    } else {
        throw py::type_error(name + ".__dlpack__() must give a DLPack capsule");
    }
    // The capsule keeps its name, so its own destructor frees it after the call.
    return array;
}

Array array_of(const std::string &name, py::handle object, size_t axes, bool written, int32_t uint16_is,
               uintptr_t stream) {
    Array array;
    if (py::isinstance<py::tuple>(object)) {
        auto parts = py::reinterpret_borrow<py::tuple>(object);
        array.data = reinterpret_cast<void *>(parts[0].cast<uintptr_t>());
        array.dtype = parts[1].cast<int32_t>(), array.device = parts[2].cast<int32_t>();
        array.device_index = parts[3].cast<int32_t>();
        array.sizes = parts[4].cast<std::vector<int64_t>>(), array.strides = parts[5].cast<std::vector<int64_t>>();
    } else {
        array = from_dlpack(name, object, written, uint16_is, stream);
    }
    if (array.sizes.size() != axes)
        refuse(name, "must have " + std::to_string(axes) + " axes, got " + std::to_string(array.sizes.size()));
    return array;
}

// Where and how a call runs, as native.py says it, and the arrays that it holds on to.
class Call {
public:
    Call(int32_t threads, int32_t isa, uintptr_t stream, int32_t uint16_is) : uint16_is_(uint16_is) {
        exec.num_threads = threads, exec.isa = isa, exec.stream = reinterpret_cast<void *>(stream);
    }

    flora_matrix matrix(const std::string &name, py::handle object, bool written = false) {
        const Array &a = hold(name, object, 2, written);
        return {a.data, a.sizes[0], a.sizes[1], a.strides[0], a.strides[1], a.dtype, 0};
    }

    flora_vector vector(const std::string &name, py::handle object, bool written = false) {
        const Array &a = hold(name, object, 1, written);
        return {a.data, a.sizes[0], a.strides[0], a.dtype, 0};
    }

    // Ask for the workspace, then run, without the interpreter's lock.
    template <class Ask, class Run>
    void run(Ask ask, Run work) {
        size_t bytes = 0;
        check(ask(&exec, &bytes));
        exec.workspace = workspace(bytes), exec.workspace_bytes = bytes;
        flora_status status;
        {
            py::gil_scoped_release unlocked;
            status = work(&exec);
        }
        check(status);
    }

    // An operation on a struct whose tables come from Python as host memory, which a GPU cannot read.
    template <class Args>
    void run_on_the_cpu(const char *op, flora_status (*ask)(const flora_exec *, const Args *, size_t *),
                        flora_status (*work)(const flora_exec *, const Args *), const Args &args) {
        if (exec.device != FLORA_CPU)
            refuse(first_, std::string("must be on the CPU: from Python, ") + op +
                               " runs there only; on CUDA call flora_kernels.h or use backend='triton'");
        run([&](auto *exec, size_t *bytes) { return ask(exec, &args, bytes); },
            [&](auto *exec) { return work(exec, &args); });
    }

    flora_exec exec = FLORA_EXEC_INIT;

private:
    const Array &hold(const std::string &name, py::handle object, size_t axes, bool written) {
        auto array = std::make_unique<Array>(
            array_of(name, object, axes, written, uint16_is_, reinterpret_cast<uintptr_t>(exec.stream)));
        if (arrays_.empty()) {
            exec.device = array->device, exec.device_index = array->device_index, first_ = name;
        } else if (array->device != exec.device || array->device_index != exec.device_index) {
            refuse(name, "must be on the device of " + first_ + "; move it there");
        }
        arrays_.push_back(std::move(array));
        return *arrays_.back();
    }

    void *workspace(size_t bytes) {
        if (!bytes) return nullptr;
        if (exec.device != FLORA_CPU) throw std::runtime_error("no merge on CUDA needs a workspace");
        // Kept from call to call: first touching fresh pages costs more than a small product.
        static thread_local std::unique_ptr<void, void (*)(void *)> kept(nullptr, std::free);
        static thread_local size_t kept_bytes = 0;
        if (kept_bytes < bytes) {
            kept.reset();
            kept_bytes = 0;
            kept.reset(std::aligned_alloc(FLORA_WORKSPACE_ALIGNMENT, bytes));
            if (!kept) throw std::bad_alloc();
            kept_bytes = bytes;
        }
        return kept.get();
    }

    static void check(flora_status status) {
        if (status == FLORA_OK) return;
        if (status == FLORA_NO_DEVICE || status == FLORA_DEVICE_ERROR) throw std::runtime_error(flora_last_error());
        throw py::value_error(flora_last_error());
    }

    int32_t uint16_is_;
    std::string first_;
    std::vector<std::unique_ptr<Array>> arrays_;
};

void merge_many(Call &call, const py::list &items, int32_t rounding, int32_t accumulate) {
    std::vector<flora_merge_item> all;
    for (size_t i = 0; i < items.size(); ++i) {
        auto parts = items[i].cast<py::tuple>();
        std::string prefix = items.size() > 1 ? "items[" + std::to_string(i) + "]." : "";
        flora_merge_item item = FLORA_MERGE_ITEM_INIT;
        item.weight = call.matrix(prefix + "weight", parts[0], true);
        item.A = call.matrix(prefix + "A", parts[1]);
        item.B = call.matrix(prefix + "B", parts[2]);
        item.coef = call.vector(prefix + "coef", parts[3]);
        if (!parts[4].is_none()) item.low_bits = call.matrix(prefix + "low_bits", parts[4], true);
        item.seed = parts[5].cast<int64_t>();
        all.push_back(item);
    }
    flora_merge_options options = FLORA_MERGE_OPTIONS_INIT;
    options.rounding = rounding, options.accumulate = accumulate;
    auto count = static_cast<int64_t>(all.size());
    const flora_merge_item *first = all.data();
    call.run([&](auto *exec, size_t *bytes) { return flora_merge_many_workspace(exec, first, count, &options, bytes); },
             [&](auto *exec) { return flora_merge_many(exec, first, count, &options); });
}

// The clients' tables as Python gives them: sequences of numbers, or None.
struct Clients {
    std::vector<int32_t> tokens, ranks, q;
    std::vector<double> scaling;
    std::vector<int64_t> seed, first_row;

    Clients(std::vector<int32_t> tokens, std::vector<int32_t> ranks, std::vector<double> scaling,
            std::vector<int32_t> q, std::vector<int64_t> seed, std::vector<int64_t> first_row)
        : tokens(std::move(tokens)), ranks(std::move(ranks)), q(std::move(q)), scaling(std::move(scaling)),
          seed(std::move(seed)), first_row(std::move(first_row)) {
        size_t offsets = this->tokens.size(), count = offsets - 1;
        bool fits = offsets > 0 && this->ranks.size() == offsets;
        for (size_t size : {this->scaling.size(), this->q.size()}) fits = fits && (size == 0 || size == count);
        fits = fits && this->seed.size() == this->q.size() && this->first_row.size() == this->q.size();
        if (!fits) throw py::value_error("ranks, scaling_C and dropout must have one entry for each client of tokens");
    }

    flora_clients table() const {
        flora_clients t = {};
        t.num_clients = static_cast<int64_t>(tokens.size()) - 1;
        t.token_offsets = tokens.data(), t.rank_offsets = ranks.data();
        t.scaling = scaling.empty() ? nullptr : scaling.data(), t.scaling_dtype = FLORA_FP64;
        if (!q.empty()) t.q = q.data(), t.seed = seed.data(), t.first_row = first_row.data();
        return t;
    }
};

void shrink(Call &call, py::handle x, py::handle A, py::handle s, const Clients &clients) {
    flora_shrink_args args = FLORA_SHRINK_ARGS_INIT;
    args.x = call.matrix("x_MK", x), args.A = call.matrix("A_PK", A), args.s = call.vector("out", s, true);
    args.clients = clients.table();
    call.run_on_the_cpu("shrink", flora_shrink_workspace, flora_shrink, args);
}

void expand(Call &call, py::handle y, py::handle s, py::handle B, const Clients &clients) {
    flora_expand_args args = FLORA_EXPAND_ARGS_INIT;
    args.y = call.matrix("y_MN", y, true), args.s = call.vector("s_flat", s), args.B = call.matrix("B_PN", B);
    args.clients = clients.table();
    call.run_on_the_cpu("expand", flora_expand_workspace, flora_expand, args);
}

void wgrad(Call &call, py::handle ds, py::handle x, py::handle s, py::handle dy, py::handle dA, py::handle dB,
           const Clients &clients) {
    flora_wgrad_args args = FLORA_WGRAD_ARGS_INIT;
    args.ds = call.vector("ds_flat", ds), args.x = call.matrix("x_MK", x);
    args.s = call.vector("s_flat", s), args.dy = call.matrix("dy_MN", dy);
    args.dA = call.matrix("dA_PK", dA, true), args.dB = call.matrix("dB_PN", dB, true);
    args.clients = clients.table();
    call.run_on_the_cpu("wgrad", flora_wgrad_workspace, flora_wgrad, args);
}

void adamw(Call &call, py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq, py::handle hyper,
           const std::vector<int64_t> &offsets, const std::vector<int32_t> &owner) {
    flora_adamw_args args = FLORA_ADAMW_ARGS_INIT;
    const char *names[] = {"param", "grad", "exp_avg", "exp_avg_sq"};
    flora_vector buffers[] = {call.vector(names[0], param, true), call.vector(names[1], grad),
                              call.vector(names[2], exp_avg, true), call.vector(names[3], exp_avg_sq, true)};
    for (int i = 0; i < 4; ++i) {
        if (buffers[i].stride != 1 && buffers[i].size > 1) refuse(names[i], "must be contiguous; copy it");
        if (buffers[i].dtype != buffers[0].dtype) refuse(names[i], "must have the elements of param; convert it");
        if (buffers[i].size != buffers[0].size)
            refuse(names[i], "must have " + std::to_string(buffers[0].size) + " elements, as param has, got " +
                                 std::to_string(buffers[i].size));
    }
    args.param = buffers[0].data, args.grad = buffers[1].data;
    args.exp_avg = buffers[2].data, args.exp_avg_sq = buffers[3].data;
    args.numel = buffers[0].size, args.dtype = buffers[0].dtype;
    args.num_segments = static_cast<int64_t>(owner.size());
    args.segment_offsets = offsets.data(), args.owner = owner.data();
    args.hyper = call.matrix("hyper_CH", hyper);
    call.run_on_the_cpu("adamw", flora_adamw_workspace, flora_adamw, args);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C interface of flora_kernels.h; use flora_kernels.native.";
    py::class_<Call>(module, "Call")
        .def(py::init<int32_t, int32_t, uintptr_t, int32_t>())
        .def_property_readonly("workspace_bytes", [](const Call &call) { return call.exec.workspace_bytes; })
        .def("merge_many", &merge_many)
        .def("shrink", &shrink)
        .def("expand", &expand)
        .def("wgrad", &wgrad)
        .def("adamw", &adamw);
    py::class_<Clients>(module, "Clients")
        .def(py::init<std::vector<int32_t>, std::vector<int32_t>, std::vector<double>, std::vector<int32_t>,
                      std::vector<int64_t>, std::vector<int64_t>>());
#ifdef FLORA_WITH_CUDA
    module.attr("built_with_cuda") = true;
#else
    module.attr("built_with_cuda") = false;
#endif
    module.def("version", &flora_version);
    module.def("abi_version", &flora_abi_version);
    module.def("cpu_isa", &flora_cpu_isa);
    module.def("cpu_threads", &flora_cpu_threads);
    module.def("why_not_cuda", []() -> py::object {
        if (flora_device_available(FLORA_CUDA, 0) == FLORA_OK) return py::none();
        return py::str(flora_last_error());
    });
}
