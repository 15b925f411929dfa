// Python bindings: they unpack arrays, call the core and pack the answer. No state and no decisions live here.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arrays.h"
#include "kvpool/checksum.h"
#include "kvpool/copy.h"
#include "kvpool/view.h"

using namespace nanobind::literals;

namespace kvpool {
namespace {

nb::bytes derive_keys(nb::bytes mask, nb::handle hashes) {
    if (mask.size() != kKeyBytes) throw std::invalid_argument("mask: give 32 bytes");
    Items items(hashes, kKeyBytes, "hashes");
    BlockKey m = BlockKey::from_bytes(mask.c_str());
    std::vector<BlockKey> keys(items.size());
    for (size_t i = 0; i < keys.size(); ++i) {
        keys[i] = BlockKey::from_bytes(items.data() + i * kKeyBytes);
        for (size_t w = 0; w < m.words.size(); ++w) keys[i].words[w] ^= m.words[w];
    }
    return pack_keys(keys);
}

uint32_t checksum(nb::handle data, uint32_t seed) {
    Items bytes(data, 1, "data");
    nb::gil_scoped_release released;
    return crc32c(bytes.data(), bytes.size(), seed);
}

// In pieces that stay in the first cache between the copy and the checksum.
uint32_t copy_checked(nb::handle destination, nb::handle source, uint32_t seed) {
    constexpr size_t kPiece = 16 << 10;
    Items from(source, 1, "source"), to(destination, 1, "destination", PyBUF_WRITABLE);
    if (from.size() != to.size()) throw std::invalid_argument("source and destination differ in length");
    auto* target = const_cast<uint8_t*>(to.data());
    nb::gil_scoped_release released;
    for (size_t at = 0; at < from.size(); at += kPiece) {
        size_t bytes = std::min(kPiece, from.size() - at);
        std::memcpy(target + at, from.data() + at, bytes);
        seed = crc32c(target + at, bytes, seed);
    }
    return seed;
}

// A slot's bytes as a buffer. It holds the mapping, and every memoryview and slice of one holds it.
struct Payload {
    std::shared_ptr<PoolFile> file;
    uint8_t* data;
    Py_ssize_t bytes;

    static int get_buffer(PyObject* self, Py_buffer* view, int flags) {
        const Payload& payload = *nb::inst_ptr<Payload>(self);
        return PyBuffer_FillInfo(view, self, payload.data, payload.bytes, 0, flags);
    }
};
PyType_Slot payload_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&Payload::get_buffer)}, {0, nullptr}};

nb::bytes match_prefix(const PoolView& view, nb::handle keys_object, uint32_t now_s) {
    Items keys(keys_object, kKeyBytes, "keys");
    std::vector<uint64_t> refs(keys.size());
    return pack_refs(refs, view.index().match_prefix(keys.data(), keys.size(), now_s, refs.data()));
}

nb::bytes lease(PoolView& view, nb::handle refs) {
    std::vector<bool> taken = view.lease(unpack_refs(refs));
    std::string mask(taken.begin(), taken.end());
    return nb::bytes(mask.data(), mask.size());
}

nb::object payload(const PoolView& view, uint64_t ref) {
    auto [data, size] = view.payload(SlotRef::unpack(ref));
    Payload payload{view.file(), data, static_cast<Py_ssize_t>(size)};
    return nb::steal(PyMemoryView_FromObject(nb::cast(std::move(payload)).ptr()));
}

nb::dict describe_pool(const PoolFile& file) {
    const Geometry& g = file.geometry();
    const FileHeader& header = file.header();
    nb::list namespaces;
    for (uint32_t i = 0; i < kMaxNamespaces; ++i) {
        if (file.namespaces()[i].active.load() != 0) namespaces.append(describe_namespace(file, i));
    }
    uint32_t clients = 0;
    for (uint32_t i = 0; i < kMaxClients; ++i) clients += file.clients()[i].active.load() != 0;
    nb::dict d;
    d["size"] = g.size;
    d["slab_bytes"] = g.slab_bytes;
    d["num_slabs"] = g.num_slabs;
    d["min_slot_bytes"] = g.min_slot_bytes;
    d["pool_id"] = pool_id_of(file);
    d["epoch"] = header.epoch.load();
    d["pid"] = header.daemon_pid.load();
    d["heartbeat_ms"] = header.heartbeat_ms.load();
    d["format_version"] = header.format_version;
    d["clients"] = clients;
    d["namespaces"] = namespaces;
    return d;
}

using RegionTuples = std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>;

std::vector<Region> make_regions(const RegionTuples& tuples) {
    std::vector<Region> regions;
    for (auto [base, stride, bytes] : tuples) regions.push_back({reinterpret_cast<uint8_t*>(base), stride, bytes});
    return regions;
}

CudaWay parse_way(const std::string& way) {
    if (way.empty()) return CudaWay::kCalibrated;
    if (way == "driver") return CudaWay::kDriver;
    if (way == "staged") return CudaWay::kStaged;
    throw std::invalid_argument("way: \"driver\", \"staged\" or nothing");
}

std::unique_ptr<CopyBackend> make_backend(const PoolView& view, std::vector<Region> regions, unsigned threads,
                                          int device, const std::string& way) {
    CudaWay cuda_way = parse_way(way);
    if (device < 0) return cpu_backend(std::move(regions), threads);
    return cuda_backend(view.file(), std::move(regions), {device, cuda_way});
}

// Keeps the mapping alive for as long as its threads may touch it.
struct PyCopyEngine {
    CopyEngine engine;

    PyCopyEngine(const PoolView& view, const RegionTuples& regions, uint64_t shard_offset, uint32_t checksum,
                 unsigned threads, int device, const std::string& way)
        : engine(view.file(), make_backend(view, make_regions(regions), threads, device, way), shard_offset, checksum) {
    }

    uint64_t submit(Direction direction, nb::handle refs, nb::handle blocks, uint64_t stream) {
        return engine.submit(direction, unpack_blocks(refs, blocks), stream);
    }

    nb::dict costs() const {
        CopyCosts costs = engine.backend().costs();
        nb::dict result;
        result["batches"] = costs.batches;
        result["copies"] = costs.copies;
        result["start_ns"] = costs.start_ns;
        result["wait_ns"] = costs.wait_ns;
        return result;
    }

    nb::list poll() {
        nb::list result;
        for (const FinishedCopy& done : engine.poll()) {
            nb::bytes status(reinterpret_cast<const char*>(done.status.data()), done.status.size());
            result.append(nb::make_tuple(done.job, status, done.nanoseconds));
        }
        return result;
    }
};

void bind_view(nb::module_& m) {
    nb::class_<Payload>(m, "Payload", nb::type_slots(payload_slots));
    nb::class_<PoolView>(m, "PoolView")
        .def_static(
            "open", [](const std::string& path) { return std::make_unique<PoolView>(path); }, "path"_a)
        .def_prop_ro("path", [](PoolView& v) { return v.file()->path(); })
        .def_prop_ro("pool_id", [](PoolView& v) { return pool_id_of(*v.file()); })
        .def_prop_ro("epoch", [](PoolView& v) { return v.file()->header().epoch.load(); })
        .def_prop_ro("num_slots", [](PoolView& v) { return v.file()->geometry().num_slots(); })
        .def("info", [](PoolView& v) { return describe_pool(*v.file()); })
        .def("match_prefix", &match_prefix, "keys"_a, "now_s"_a)
        .def("attach_client", &PoolView::attach_client, "client"_a)
        .def("lease", &lease, "refs"_a)
        .def(
            "release", [](PoolView& v, nb::handle refs) { v.release(unpack_refs(refs)); }, "refs"_a)
        .def_prop_ro("leased_slots", &PoolView::leased_slots)
        .def("payload", &payload, "ref"_a)
        .def("check_integrity", &PoolView::check_integrity);
}

void bind_copy(nb::module_& m) {
    nb::class_<PyCopyEngine>(m, "CopyEngine")
        .def(nb::init<const PoolView&, const RegionTuples&, uint64_t, uint32_t, unsigned, int, const std::string&>(),
             "view"_a, "regions"_a, "shard_offset"_a, "checksum"_a, "threads"_a = 2, "device"_a = -1, "way"_a = "")
        .def_static(
            "shard_bytes", [](const RegionTuples& regions) { return CopyEngine::shard_bytes(make_regions(regions)); },
            "regions"_a)
        .def_prop_ro("backend", [](PyCopyEngine& c) { return c.engine.backend().describe(); })
        .def_prop_ro("error", [](PyCopyEngine& c) { return c.engine.backend().error(); })
        .def_prop_ro("is_off", [](PyCopyEngine& c) { return c.engine.backend().is_off(); })
        .def_prop_ro("registered_bytes", [](PyCopyEngine& c) { return c.engine.backend().registered_bytes(); })
        .def_prop_ro("costs", &PyCopyEngine::costs)
        .def(
            "submit_store",
            [](PyCopyEngine& c, nb::handle refs, nb::handle blocks, uint64_t stream) {
                return c.submit(Direction::kStore, refs, blocks, stream);
            },
            "refs"_a, "blocks"_a, "stream"_a = 0)
        .def(
            "submit_load",
            [](PyCopyEngine& c, nb::handle refs, nb::handle blocks, uint64_t stream) {
                return c.submit(Direction::kLoad, refs, blocks, stream);
            },
            "refs"_a, "blocks"_a, "stream"_a = 0)
        .def("poll", &PyCopyEngine::poll)
        .def(
            "arriving", [](PyCopyEngine& c, uint64_t ms) { return c.engine.arriving(ms); }, "milliseconds"_a = 0,
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "order_after_loads", [](PyCopyEngine& c, uint64_t stream) { return c.engine.order_after_loads(stream); },
            "stream"_a)
        .def(
            "wait", [](PyCopyEngine& c, uint64_t job, uint64_t ms) { return c.engine.wait(job, ms); }, "job"_a,
            "milliseconds"_a, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("loads_stand_still_s",
                     [](PyCopyEngine& c) { return static_cast<double>(c.engine.loads_stand_still_ns()) / 1e9; })
        .def(
            "cancel", [](PyCopyEngine& c, uint64_t job) { c.engine.cancel(job); }, "job"_a,
            nb::call_guard<nb::gil_scoped_release>())
        .def("close", [](PyCopyEngine& c) { c.engine.close(); }, nb::call_guard<nb::gil_scoped_release>());
    m.attr("COPY_OK") = static_cast<int>(CopyStatus::kOk);
    m.attr("COPY_STALE") = static_cast<int>(CopyStatus::kStale);
    m.attr("COPY_CHECKSUM") = static_cast<int>(CopyStatus::kChecksum);
    m.attr("COPY_CANCELLED") = static_cast<int>(CopyStatus::kCancelled);
    m.attr("COPY_FAILED") = static_cast<int>(CopyStatus::kFailed);
    m.attr("COPY_UNMAPPED") = static_cast<int>(CopyStatus::kUnmapped);
}

}  // namespace
}  // namespace kvpool

NB_MODULE(_native, m) {
    using namespace kvpool;
    nb::exception<PoolFormatError>(m, "PoolFormatError");
    nb::exception<IntegrityError>(m, "IntegrityError", PyExc_AssertionError);
    nb::register_exception_translator([](const std::exception_ptr& p, void*) {
        try {
            std::rethrow_exception(p);
        } catch (const std::system_error& e) {
            // OSError(errno, text), so that Python picks FileNotFoundError and its like
            nb::object args = nb::make_tuple(e.code().value(), e.what());
            PyErr_SetObject(PyExc_OSError, args.ptr());
        }
    });
    m.attr("FORMAT_VERSION") = kFormatVersion;
    m.attr("MAX_CLIENTS") = kMaxClients;
    m.attr("MAX_NAMESPACES") = kMaxNamespaces;
    m.def("crc32c", &checksum, "data"_a, "seed"_a = 0);
    m.def("copy_checked", &copy_checked, "destination"_a, "source"_a, "seed"_a = 0);
    m.def("derive_keys", &derive_keys, "mask"_a, "hashes"_a);
    bind_owner(m);
    bind_view(m);
    bind_copy(m);
}
