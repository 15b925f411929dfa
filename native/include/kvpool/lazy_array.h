// A zeroed array whose untouched pages cost nothing: per-slot facts of pools with millions of possible slots.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace kvpool {

template <class T>
class LazyArray {
  public:
    explicit LazyArray(size_t size) : bytes_(size * sizeof(T) + 1) {
        void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<T*>(p);
    }
    LazyArray(LazyArray&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
    LazyArray& operator=(LazyArray&&) = delete;
    ~LazyArray() {
        if (data_ != nullptr) munmap(data_, bytes_);
    }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    size_t bytes_;
    T* data_;
};

}  // namespace kvpool
