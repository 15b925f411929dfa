// How arrays cross the Python boundary: as bytes, a batch at a time.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <string>
#include <vector>

#include "kvpool/copy.h"

namespace kvpool {

namespace nb = nanobind;

// A contiguous buffer of n items, borrowed for the duration of a call.
class Items {
  public:
    Items(nb::handle object, size_t item_bytes, const char* name, int flags = PyBUF_SIMPLE) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw nb::python_error();
        if (static_cast<size_t>(view_.len) % item_bytes != 0) {
            std::string message = std::string(name) + ": " + std::to_string(view_.len) + " bytes are no multiple of " +
                                  std::to_string(item_bytes);
            PyBuffer_Release(&view_);
            throw std::invalid_argument(message);
        }
        count_ = static_cast<size_t>(view_.len) / item_bytes;
    }
    ~Items() { PyBuffer_Release(&view_); }
    Items(const Items&) = delete;
    const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
    size_t size() const { return count_; }

  private:
    Py_buffer view_{};
    size_t count_ = 0;
};

inline std::vector<SlotRef> unpack_refs(nb::handle object) {
    Items items(object, sizeof(uint64_t), "refs");
    std::vector<SlotRef> refs(items.size());
    for (size_t i = 0; i < refs.size(); ++i) {
        uint64_t packed;
        std::memcpy(&packed, items.data() + i * sizeof(packed), sizeof(packed));
        refs[i] = SlotRef::unpack(packed);
    }
    return refs;
}

inline std::vector<BlockKey> unpack_keys(nb::handle object) {
    Items items(object, kKeyBytes, "keys");
    std::vector<BlockKey> keys(items.size());
    for (size_t i = 0; i < keys.size(); ++i) keys[i] = BlockKey::from_bytes(items.data() + i * kKeyBytes);
    return keys;
}

inline std::vector<CopyBlock> unpack_blocks(nb::handle refs_object, nb::handle blocks_object) {
    std::vector<SlotRef> refs = unpack_refs(refs_object);
    Items numbers(blocks_object, sizeof(uint32_t), "blocks");
    if (numbers.size() != refs.size()) throw std::invalid_argument("refs and blocks differ in length");
    std::vector<CopyBlock> blocks(refs.size());
    for (size_t i = 0; i < refs.size(); ++i) {
        blocks[i].ref = refs[i];
        std::memcpy(&blocks[i].block, numbers.data() + i * sizeof(uint32_t), sizeof(uint32_t));
    }
    return blocks;
}

inline nb::bytes pack_keys(const std::vector<BlockKey>& keys) {
    return nb::bytes(reinterpret_cast<const char*>(keys.data()), keys.size() * kKeyBytes);
}

inline nb::bytes pack_refs(const std::vector<uint64_t>& refs, size_t count) {
    return nb::bytes(reinterpret_cast<const char*>(refs.data()), count * sizeof(uint64_t));
}

}  // namespace kvpool
