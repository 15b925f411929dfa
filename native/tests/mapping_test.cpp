#include "kvpool/mapping.h"

#include <sys/stat.h>

#include <functional>

#include "fixtures.h"

using namespace kvpool;

namespace {

const Geometry kGeometry = Geometry::plan(8 * kMiB, kSlotBytes);

// Opens a pool file after `damage` was done to its first page.
void open_damaged(const std::function<void(FileHeader&)>& damage) {
    Folder folder;
    PoolFile file = PoolFile::create(folder.pool(), kGeometry, 0600);
    damage(file.header());
    PoolFile::open(folder.pool());
}

}  // namespace

TEST(a_new_file_is_whole_and_empty) {
    Folder folder;
    PoolFile file = PoolFile::create(folder.pool(), kGeometry, 0640);
    struct stat st{};
    CHECK_EQ(stat(folder.pool().c_str(), &st), 0);
    CHECK_EQ(st.st_mode & 0777u, 0640u);
    CHECK_EQ(static_cast<uint64_t>(st.st_size), kGeometry.end);
    CHECK(access((folder.pool() + ".new").c_str(), F_OK) != 0);
    CHECK_EQ(file.header().epoch.load(), 1u);
    CHECK_EQ(file.clients()[0].active.load(), 0u);
}

TEST(another_process_reads_the_same) {
    Folder folder;
    PoolFile file = PoolFile::create(folder.pool(), kGeometry, 0600);
    PoolFile again = PoolFile::open(folder.pool());
    CHECK_EQ(again.geometry().end, file.geometry().end);
    CHECK_EQ(again.geometry().num_slots(), file.geometry().num_slots());
    file.header().epoch.store(9);
    CHECK_EQ(again.header().epoch.load(), 9u);
}

TEST(pools_of_one_name_differ_in_id) {
    Folder folder;
    PoolFile a = PoolFile::create(folder.pool(), kGeometry, 0600);
    PoolFile b = PoolFile::create(folder.pool(), kGeometry, 0600);
    CHECK(std::memcmp(a.header().fixed.pool_id, b.header().fixed.pool_id, 32) != 0);
}

TEST(a_draft_that_a_killed_daemon_left_is_no_obstacle) {
    Folder folder;
    close(open((folder.pool() + ".new").c_str(), O_CREAT | O_RDWR, 0600));
    PoolFile::create(folder.pool(), kGeometry, 0600);
    PoolFile::open(folder.pool());
}

TEST(other_files_are_refused) {
    Folder folder;
    CHECK_THROWS(std::system_error, PoolFile::open(folder.pool()));
    close(open(folder.pool().c_str(), O_CREAT | O_RDWR, 0600));
    CHECK_THROWS(PoolFormatError, PoolFile::open(folder.pool()));  // empty
    CHECK_EQ(truncate(folder.pool().c_str(), 1 << 20), 0);
    CHECK_THROWS(PoolFormatError, PoolFile::open(folder.pool()));  // zeros
    CHECK_THROWS(std::system_error, PoolFile::create("/no/such/folder/pool", kGeometry, 0600));
}

TEST(another_version_is_refused) {
    CHECK_THROWS(PoolFormatError, open_damaged([](FileHeader& h) { h.format_version += 1; }));
}

TEST(a_damaged_header_is_refused) {
    CHECK_THROWS(PoolFormatError, open_damaged([](FileHeader& h) { h.magic ^= 1; }));
    CHECK_THROWS(PoolFormatError, open_damaged([](FileHeader& h) { h.fixed.size += 4096; }));
    CHECK_THROWS(PoolFormatError, open_damaged([](FileHeader& h) { h.fixed.pool_id[31] ^= 1; }));
    CHECK_THROWS(PoolFormatError, open_damaged([](FileHeader& h) { h.checksum ^= 1; }));
}

TEST(a_file_of_another_length_is_refused) {
    Folder folder;
    PoolFile::create(folder.pool(), kGeometry, 0600);
    auto length = static_cast<off_t>(kGeometry.end);
    for (off_t other : {length - 4096, length + 4096, off_t{4096}, off_t{100}}) {
        CHECK_EQ(truncate(folder.pool().c_str(), other), 0);
        CHECK_THROWS(PoolFormatError, PoolFile::open(folder.pool()));
    }
}

TEST(a_deleted_file_stays_mapped) {
    Folder folder;
    PoolFile file = PoolFile::create(folder.pool(), kGeometry, 0600);
    unlink(folder.pool().c_str());
    file.populate(kGeometry.slab_at(0), kGeometry.slab_bytes);
    file.base()[kGeometry.end - 1] = 1;
}
