#include "kvpool/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <random>
#include <utility>

#include "kvpool/checksum.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvpool {
namespace {

class Descriptor {
  public:
    Descriptor(const std::string& path, int flags, unsigned mode = 0) : fd_(::open(path.c_str(), flags, mode)) {
        if (fd_ < 0) throw_errno(path);
    }
    ~Descriptor() { ::close(fd_); }
    int get() const { return fd_; }

  private:
    int fd_;
};

uint8_t* map(int fd, uint64_t bytes, const std::string& path) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) throw_errno("mmap " + path);
    madvise(p, bytes, MADV_DONTDUMP);  // a crash of an engine must not write the pool to disk
    return static_cast<uint8_t*>(p);
}

void draw_pool_id(char (&id)[32]) {
    std::random_device random;
    for (char& c : id) c = "0123456789abcdef"[random() % 16];
}

Geometry read_geometry(int fd, const std::string& path) {
    FileHeader header{};
    constexpr size_t plain = offsetof(FileHeader, epoch);
    if (pread(fd, static_cast<void*>(&header), plain, 0) != static_cast<ssize_t>(plain) || header.magic != kMagic) {
        throw PoolFormatError(path + " is not a pool file");
    }
    if (header.format_version != kFormatVersion) {
        throw PoolFormatError(path + " has format version " + std::to_string(header.format_version) +
                              ", this program reads " + std::to_string(kFormatVersion));
    }
    if (header.checksum != crc32c(&header.fixed, sizeof(header.fixed))) {
        throw PoolFormatError(path + " has a damaged header");
    }
    const auto& fixed = header.fixed;
    Geometry geometry = Geometry::derive(fixed.size, fixed.slab_bytes, fixed.min_slot_bytes);
    struct stat st{};
    if (fstat(fd, &st) != 0) throw_errno(path);
    if (static_cast<uint64_t>(st.st_size) != geometry.end) throw PoolFormatError(path + " is cut short");
    return geometry;
}

}  // namespace

PoolFile PoolFile::create(const std::string& path, const Geometry& geometry, unsigned mode) {
    // Built under another name: nobody ever sees half a header.
    std::string draft = path + ".new";
    unlink(draft.c_str());
    Descriptor fd(draft, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    try {
        if (fchmod(fd.get(), mode) != 0 || ftruncate(fd.get(), static_cast<off_t>(geometry.end)) != 0) {
            throw_errno(draft);
        }
        PoolFile file(path, geometry, map(fd.get(), geometry.end, draft));
        file.populate(0, geometry.slots_at);
        // So that engines can come even when the mount is full by then.
        file.populate(geometry.bitmaps_at, kReservedBitmaps * geometry.bitmap_words * sizeof(LeaseWord));
        FileHeader& header = file.header();
        header.magic = kMagic;
        header.format_version = kFormatVersion;
        header.fixed.size = geometry.size;
        header.fixed.slab_bytes = geometry.slab_bytes;
        header.fixed.min_slot_bytes = geometry.min_slot_bytes;
        draw_pool_id(header.fixed.pool_id);
        header.checksum = crc32c(&header.fixed, sizeof(header.fixed));
        header.epoch.store(1);
        if (rename(draft.c_str(), path.c_str()) != 0) throw_errno(path);
        return file;
    } catch (...) {
        unlink(draft.c_str());
        throw;
    }
}

PoolFile PoolFile::open(const std::string& path) {
    Descriptor fd(path, O_RDWR | O_CLOEXEC);
    Geometry geometry = read_geometry(fd.get(), path);
    PoolFile file(path, geometry, map(fd.get(), geometry.end, path));
    // All before the slots exists: take it into our page table now, not page by page in the first lookups. An older
    // kernel cannot, and costs them some hundred microseconds.
    madvise(file.base_, geometry.slots_at, MADV_POPULATE_READ);
    return file;
}

PoolFile::PoolFile(PoolFile&& other) noexcept
    : path_(std::move(other.path_)), geometry_(other.geometry_), base_(std::exchange(other.base_, nullptr)) {}

PoolFile::~PoolFile() {
    close();
}

void PoolFile::close() {
    if (base_ != nullptr) munmap(base_, geometry_.end);
    base_ = nullptr;
}

void PoolFile::populate(uint64_t offset, uint64_t bytes) const {
    uint64_t first = offset / 4096 * 4096;
    while (madvise(base_ + first, offset + bytes - first, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EFAULT) errno = ENOSPC;  // what a full tmpfs says here
        throw_errno("populate " + path_);
    }
}

}  // namespace kvpool
