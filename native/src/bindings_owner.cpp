// The binding of the daemon's side, `PoolOwner`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "bindings.h"
#include "kvpool/leases.h"
#include "kvpool/owner.h"

using namespace nanobind::literals;

namespace kvpool {
namespace {

nb::list list_namespaces(const PoolOwner& owner) {
    nb::list result;
    for (uint32_t i = 0; i < kMaxNamespaces; ++i) {
        if (owner.file().namespaces()[i].active.load() == 0) continue;
        nb::dict d = describe_namespace(owner.file(), i);
        NamespaceCounts c = owner.counts(i);
        d["slabs"] = c.slabs;
        d["slots"] = c.slots;
        d["free"] = c.free;
        d["writing"] = c.writing;
        d["ready"] = c.ready;
        d["doomed"] = c.doomed;
        d["pinned"] = c.pinned;
        result.append(d);
    }
    return result;
}

nb::list list_clients(const PoolFile& file, const ClientTable& clients) {
    nb::list result;
    for (uint32_t i : clients.all()) {
        nb::dict d;
        d["index"] = i;
        d["client_id"] = clients.id(i);
        d["pid"] = file.clients()[i].pid.load();
        d["namespace"] = clients.name_space(i);
        d["leases"] = count_leases(file, i);
        result.append(d);
    }
    return result;
}

HostId unpack_host(nb::bytes id) {
    HostId host;
    if (id.size() != host.size()) throw std::invalid_argument("source: give 16 bytes");
    std::memcpy(host.data(), id.data(), host.size());
    return host;
}

}  // namespace

void bind_owner(nb::module_& m) {
    nb::class_<PoolOwner>(m, "PoolOwner")
        .def_static("create", &PoolOwner::create, "path"_a, "size"_a, "min_slot_bytes"_a = 65536, nb::kw_only(),
                    "mode"_a = 0600, "policy"_a = "")
        .def_static("attach", &PoolOwner::attach, "path"_a, nb::kw_only(), "now_s"_a, "policy"_a = "",
                    nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("path", [](PoolOwner& o) { return o.file().path(); })
        .def_prop_ro("epoch", [](PoolOwner& o) { return o.file().header().epoch.load(); })
        .def_prop_ro("pool_id", [](PoolOwner& o) { return pool_id_of(o.file()); })
        .def_prop_ro("size", [](PoolOwner& o) { return o.file().geometry().size; })
        .def_prop_ro("slab_bytes", [](PoolOwner& o) { return o.file().geometry().slab_bytes; })
        .def_prop_ro("num_slabs", [](PoolOwner& o) { return o.file().geometry().num_slabs; })
        .def_prop_ro("num_slots", [](PoolOwner& o) { return o.file().geometry().num_slots(); })
        .def_prop_ro("min_slot_bytes", [](PoolOwner& o) { return o.file().geometry().min_slot_bytes; })
        .def_prop_ro("populated_slabs", &PoolOwner::populated_slabs)
        .def("advise_hugepages", &PoolOwner::advise_hugepages)
        .def("bind_numa", &PoolOwner::bind_numa, "nodes"_a)
        .def("populate", &PoolOwner::populate, "slab"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "add_namespace",
            [](PoolOwner& o, nb::bytes digest, uint32_t slot_bytes, const std::string& description) {
                if (digest.size() != 32) throw std::invalid_argument("digest: give 32 bytes");
                return o.add_namespace(static_cast<const uint8_t*>(digest.data()), slot_bytes, description);
            },
            "digest"_a, "slot_bytes"_a, "description"_a)
        .def("namespaces", &list_namespaces)
        .def("add_client", &PoolOwner::add_client, "client_id"_a, "lock_path"_a, "pid"_a, "namespace"_a)
        .def("clients", [](PoolOwner& o) { return list_clients(o.file(), o.clients()); })
        .def("reap_clients", &PoolOwner::reap_clients, "now_s"_a, "grace_s"_a)
        .def(
            "prepare_store",
            [](PoolOwner& o, uint32_t client, nb::handle keys_object, nb::bytes parent, uint32_t now_s,
               uint32_t expiry_s, bool pin, nb::bytes source) {
                std::vector<BlockKey> keys = unpack_keys(keys_object);
                std::optional<BlockKey> above;
                if (parent.size() == kKeyBytes) above = BlockKey::from_bytes(parent.data());
                if (!above && parent.size() != 0) throw std::invalid_argument("parent: give 32 bytes or none");
                std::vector<uint64_t> refs(keys.size());
                StoreOptions options{expiry_s, pin};
                if (source.size() != 0) options.source = unpack_host(source);
                o.prepare_store(client, keys, above ? &*above : nullptr, now_s, options, refs.data());
                return pack_refs(refs, refs.size());
            },
            "client"_a, "keys"_a, "parent"_a, "now_s"_a, nb::kw_only(), "expiry_s"_a = 0, "pin"_a = false,
            "source"_a = nb::bytes("", 0))
        .def(
            "complete_store",
            [](PoolOwner& o, uint32_t client, nb::handle refs) { return o.complete_store(client, unpack_refs(refs)); },
            "client"_a, "refs"_a)
        .def(
            "abort_store",
            [](PoolOwner& o, uint32_t client, nb::handle refs) { return o.abort_store(client, unpack_refs(refs)); },
            "client"_a, "refs"_a)
        .def(
            "keep_writing",
            [](PoolOwner& o, uint32_t client, nb::handle refs) { return o.keep_writing(client, unpack_refs(refs)); },
            "client"_a, "refs"_a)
        .def(
            "touch", [](PoolOwner& o, nb::handle refs) { o.touch(unpack_refs(refs)); }, "refs"_a)
        .def(
            "drop", [](PoolOwner& o, nb::handle refs) { return o.drop(unpack_refs(refs)); }, "refs"_a)
        .def(
            "clear",
            [](PoolOwner& o, int name_space, bool pinned) {
                return o.clear(name_space < 0 ? std::nullopt : std::optional<uint32_t>(name_space), pinned);
            },
            "namespace"_a = -1, nb::kw_only(), "pinned"_a = true)
        .def("expire", &PoolOwner::expire, "now_s"_a)
        .def("evict", &PoolOwner::evict, "namespace"_a, "count"_a)
        .def(
            "mark_copies",
            [](PoolOwner& o, nb::handle keys, nb::bytes source) {
                return o.mark_copies(unpack_keys(keys), unpack_host(source));
            },
            "keys"_a, "source"_a)
        .def("copy_sources",
             [](PoolOwner& o) {
                 nb::list ids;
                 for (const HostId& id : o.copy_sources()) ids.append(nb::bytes(id.data(), id.size()));
                 return ids;
             })
        .def(
            "forget_source", [](PoolOwner& o, nb::bytes source) { o.forget_source(unpack_host(source)); }, "source"_a)
        .def("keep_journal", &PoolOwner::keep_journal)
        .def("take_changes",
             [](PoolOwner& o) {
                 nb::list changes;
                 for (auto& [name_space, change] : o.take_changes()) {
                     changes.append(nb::make_tuple(name_space, pack_keys(change.ready), pack_keys(change.gone)));
                 }
                 return changes;
             })
        .def(
            "ready_keys",
            [](PoolOwner& o, uint32_t from, uint32_t limit) {
                PoolOwner::ReadyKeys found = o.ready_keys(from, limit);
                int index = found.name_space == kNoSlot ? -1 : static_cast<int>(found.name_space);
                return nb::make_tuple(index, pack_keys(found.keys), found.next);
            },
            "first"_a, "limit"_a)
        .def(
            "ready_leaves",
            [](PoolOwner& o, uint32_t from, uint32_t limit) {
                PoolOwner::ReadyKeys found = o.ready_keys(from, limit, true);
                int index = found.name_space == kNoSlot ? -1 : static_cast<int>(found.name_space);
                nb::list leaves;
                for (size_t i = 0; i < found.keys.size(); ++i) {
                    const std::optional<BlockKey>& parent = found.parents[i];
                    nb::bytes above = parent ? pack_keys({*parent}) : nb::bytes("", 0);
                    leaves.append(nb::make_tuple(above, pack_keys({found.keys[i]})));
                }
                return nb::make_tuple(index, leaves, found.next);
            },
            "first"_a, "limit"_a)
        .def(
            "path_to",
            [](PoolOwner& o, nb::bytes key) {
                if (key.size() != kKeyBytes) throw std::invalid_argument("key: give 32 bytes");
                return pack_keys(o.path_to(BlockKey::from_bytes(key.data())));
            },
            "key"_a)
        .def(
            "beat",
            [](PoolOwner& o, uint64_t now_ms, int64_t pid) {
                o.file().header().heartbeat_ms.store(now_ms);
                o.file().header().daemon_pid.store(pid);
            },
            "now_ms"_a, "pid"_a)
        .def("stats",
             [](PoolOwner& o) {
                 nb::dict d;
                 for (auto& [name, value] : o.stats()) d[name.c_str()] = value;
                 return d;
             })
        .def("check_integrity", &PoolOwner::check_integrity);
}

}  // namespace kvpool
