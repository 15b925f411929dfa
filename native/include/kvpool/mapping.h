// A pool file mapped into this process, and typed access to its parts.
#pragma once

#include <string>

#include "kvpool/format.h"

namespace kvpool {

class PoolFile {
  public:
    // Makes `path` (which must not exist) with an empty pool. std::system_error when the kernel refuses.
    static PoolFile create(const std::string& path, const Geometry& geometry, unsigned mode);
    // Maps an existing pool; PoolFormatError when it is none, or of another format.
    static PoolFile open(const std::string& path);

    PoolFile(PoolFile&& other) noexcept;
    PoolFile& operator=(PoolFile&&) = delete;
    ~PoolFile();
    void close();  // idempotent

    const std::string& path() const { return path_; }
    const Geometry& geometry() const { return geometry_; }
    uint8_t* base() const { return base_; }

    FileHeader& header() const { return *at<FileHeader>(0); }
    ClientEntry* clients() const { return at<ClientEntry>(geometry_.clients_at); }
    NamespaceEntry* namespaces() const { return at<NamespaceEntry>(geometry_.namespaces_at); }
    SlabEntry* slabs() const { return at<SlabEntry>(geometry_.slab_table_at); }
    IndexEntry* index() const { return at<IndexEntry>(geometry_.index_at); }
    SlotHeader* slots() const { return at<SlotHeader>(geometry_.slots_at); }
    LeaseWord* bitmap(uint32_t client) const {
        return at<LeaseWord>(geometry_.bitmaps_at) + client * geometry_.bitmap_words;
    }

    uint32_t slab_of(uint32_t slot) const { return static_cast<uint32_t>(slot / geometry_.slots_per_slab); }
    // First payload byte; meaningful while the slot is WRITING by us or leased.
    uint8_t* payload(uint32_t slot) const {
        uint32_t slab = slab_of(slot);
        uint64_t place = slot % geometry_.slots_per_slab;
        uint64_t slot_bytes = slabs()[slab].slot_bytes.load(std::memory_order_relaxed);
        return base_ + geometry_.slab_at(slab) + place * slot_bytes;
    }

    // Makes the pages of a range exist; ENOMEM or EFAULT (the mount is full) become std::system_error.
    void populate(uint64_t offset, uint64_t bytes) const;

  private:
    PoolFile(std::string path, Geometry geometry, uint8_t* base)
        : path_(std::move(path)), geometry_(geometry), base_(base) {}
    template <class T>
    T* at(uint64_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

    std::string path_;
    Geometry geometry_;
    uint8_t* base_;
};

}  // namespace kvpool
