// What the files of the bindings share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <string>

#include "kvpool/mapping.h"

namespace kvpool {

namespace nb = nanobind;

void bind_owner(nb::module_& m);

inline std::string pool_id_of(const PoolFile& file) {
    return {file.header().fixed.pool_id, 32};
}

inline nb::dict describe_namespace(const PoolFile& file, uint32_t index) {
    const NamespaceEntry& entry = file.namespaces()[index];
    nb::dict d;
    d["index"] = index;
    d["digest"] = nb::bytes(reinterpret_cast<const char*>(entry.digest), sizeof(entry.digest)).attr("hex")();
    d["slot_bytes"] = entry.slot_bytes.load();
    d["description"] = std::string(entry.description, strnlen(entry.description, kDescriptionBytes));
    return d;
}

}  // namespace kvpool
