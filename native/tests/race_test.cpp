// Threads play the processes, over one mapping, so that ThreadSanitizer sees all that they share.
// Readers hold leases; the daemon's thread stores, evicts and drops in a pool that is far too
// small. Payload bytes are plain memory: any read of a slot that is being written is reported.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "fixtures.h"
#include "kvpool/copy.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kDuration = std::chrono::milliseconds(2'500), kPatience = std::chrono::milliseconds(60'000);
constexpr size_t kChains = 12, kChainBlocks = 16;  // six times the room there is

std::vector<BlockKey> chain(uint64_t number) {
    return keys_of(1 + number * 100, kChainBlocks);
}

// For a while, and on a machine that lets a thread stand still until enough has happened.
template <class Enough>
bool goes_on(Clock::time_point begun, Enough enough) {
    auto passed = Clock::now() - begun;
    return passed < kDuration || (passed < kPatience && !enough());
}

// Failures of a thread; the test checks them when the thread has ended.
struct Findings {
    std::atomic<uint64_t> leases{0}, misses{0}, wrong{0};
};

// One client's life: match, lease, read, release.
void read_until(const PoolFile& file, uint32_t client, const std::atomic<bool>& stop, uint64_t seed,
                Findings& findings) {
    Random random(seed);
    IndexReader index(file);
    LeaseTable leases(file, client);
    while (!stop) {
        std::vector<BlockKey> keys = chain(below(random, kChains));
        uint64_t packed[kChainBlocks];
        auto bytes = reinterpret_cast<const uint8_t*>(keys.data());
        size_t hits = index.match_prefix(bytes, keys.size(), 0, packed);
        std::vector<bool> leased(hits);
        for (size_t i = 0; i < hits; ++i) leased[i] = leases.take(SlotRef::unpack(packed[i]));
        for (int again = 0; again < 2; ++again) {
            for (size_t i = 0; i < hits; ++i) {
                if (!leased[i]) continue;
                SlotRef ref = SlotRef::unpack(packed[i]);
                const uint8_t* payload = file.payload(ref.slot);
                if (!Pattern::fits(payload, kSlotBytes, keys[i], ref.generation)) ++findings.wrong;
            }
        }
        for (size_t i = 0; i < hits; ++i) {
            if (leased[i]) leases.release(SlotRef::unpack(packed[i]));
            ++(leased[i] ? findings.leases : findings.misses);
        }
    }
    if (leases.held() != 0) ++findings.wrong;
}

// The daemon's thread and the writing worker in one.
template <class Enough>
void write_until(Pool& pool, uint32_t client, Enough enough) {
    Random random(1);
    auto begun = Clock::now();
    for (uint32_t now_s = 0; goes_on(begun, enough); ++now_s) {
        std::vector<BlockKey> keys = chain(below(random, kChains));
        std::vector<SlotRef> refs = pool.prepare(client, keys, nullptr, {}, now_s);
        std::vector<SlotRef> written;
        for (size_t i = 0; i < keys.size(); ++i) {
            if (refs[i].none()) continue;
            uint8_t* payload = pool.owner->file().payload(refs[i].slot);
            Pattern::write(payload, kSlotBytes, keys[i], refs[i].generation);
            written.push_back(refs[i]);
        }
        pool.owner->complete_store(client, written);
        if (below(random, 4) == 0 && !written.empty()) {
            pool.owner->drop({written[below(random, written.size())]});
        }
        if (below(random, 8) == 0) pool.owner->evict(pool.name_space, 4);
        if (below(random, 64) == 0) pool.owner->clear(std::nullopt, true);
        if (below(random, 8) == 0) pool.owner->expire(now_s);
    }
}

}  // namespace

TEST(a_leased_block_never_changes) {
    Pool pool(1, "arc");
    uint32_t writer = pool.add_client("writer");
    std::atomic<bool> stop{false};
    Findings findings[2];
    std::vector<std::thread> readers;
    for (uint32_t i = 0; i < 2; ++i) {
        uint32_t client = pool.add_client("reader-" + std::to_string(i));
        readers.emplace_back(read_until, std::cref(pool.owner->file()), client, std::cref(stop), i,
                             std::ref(findings[i]));
    }
    auto enough = [&] {
        bool read = std::all_of(std::begin(findings), std::end(findings), [](auto& f) { return f.leases > 100; });
        return read && pool.stat("lease_vetoes") > 0 && pool.stat("evicted") > 100;
    };
    write_until(pool, writer, enough);
    stop = true;
    for (std::thread& reader : readers) reader.join();
    for (const Findings& f : findings) CHECK_EQ(f.wrong.load(), 0u);
    CHECK(enough());
    pool.owner->expire(0);
    CHECK_EQ(pool.stat("doomed"), 0u);
    pool.owner->check_integrity();
}

// Both sides at one slot all the time: at least one of them must see the other.
TEST(lease_against_evictor) {
    Pool pool(1);
    uint32_t writer = pool.add_client("writer");
    PoolFile& file = pool.owner->file();
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> newest{0}, leases{0}, broken{0};
    std::vector<std::thread> readers;
    for (uint32_t i = 0; i < 2; ++i) {
        uint32_t client = pool.add_client("reader-" + std::to_string(i));
        readers.emplace_back([&, client] {
            LeaseTable table(file, client);
            while (!stop) {
                SlotRef ref = SlotRef::unpack(newest.load());
                if (!table.take(ref)) continue;
                ++leases;
                // Nobody may give the slot away now, whatever is tried.
                for (int look = 0; look < 20; ++look) {
                    uint64_t word = file.slots()[ref.slot].word.load();
                    bool ours =
                        SlotWord::generation(word) == ref.generation && SlotWord::state(word) != SlotState::kFree;
                    if (!ours) ++broken;
                }
                table.release(ref);
                std::this_thread::yield();  // or the slot would be leased all the time
            }
        });
    }
    auto enough = [&] { return leases > 100 && pool.stat("evicted") > 100; };
    for (auto begun = Clock::now(); goes_on(begun, enough);) {
        SlotRef ref = pool.store(writer, keys_of(1, 1))[0];
        if (!ref.none()) newest = ref.pack();
        pool.owner->evict(pool.name_space, 1);
    }
    stop = true;
    for (std::thread& reader : readers) reader.join();
    CHECK_EQ(broken.load(), 0u);
    CHECK(enough());
    pool.owner->check_integrity();
}

// Slabs get their pages on other threads while the daemon's thread gives them out.
TEST(populate_beside_the_verbs) {
    Folder folder;
    auto owner = PoolOwner::create(folder.pool(), 26 * kMiB, kSlotBytes, 0600, "lru");
    uint8_t digest[32] = {1};
    uint32_t ns = owner->add_namespace(digest, kSlotBytes, "test");
    HeldLock lock(folder.lock("a"));
    uint32_t client = owner->add_client("a", folder.lock("a"), getpid(), ns);
    auto num_slabs = static_cast<uint32_t>(owner->file().geometry().num_slabs);
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < 2; ++t) {
        threads.emplace_back([&, t] {
            for (uint32_t slab = t; slab < num_slabs; slab += 2) owner->populate(slab);
        });
    }
    for (uint64_t i = 0; owner->counts(ns).slabs < num_slabs; ++i) {
        std::vector<uint64_t> refs(1);
        owner->prepare_store(client, keys_of(i, 1), nullptr, 0, {}, refs.data());
        owner->complete_store(client, {SlotRef::unpack(refs[0])});
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(owner->populated_slabs(), num_slabs);
    owner->check_integrity();
}

// A worker's whole round: store jobs fill slots, complete_store, loads under leases into other
// memory, some of them cancelled. One thread asks, as the connector does; the workers copy.
TEST(copies_beside_cancel_and_poll) {
    Pool pool(2, "lru");
    uint32_t client = pool.add_client();
    auto file = std::make_shared<PoolFile>(PoolFile::open(pool.folder.pool()));
    constexpr uint32_t kBlocks = 64;
    constexpr uint64_t kBytes = 2048;
    std::vector<uint8_t> memory(2 * kBlocks * kBytes * 2);
    auto words = reinterpret_cast<uint64_t*>(memory.data());
    std::vector<Region> regions = {{memory.data(), kBytes, kBytes},
                                   {memory.data() + memory.size() / 2, kBytes, kBytes}};
    CopyEngine engine(file, cpu_backend(regions, 3), 0, 1);
    auto finish = [&](uint64_t job) {
        while (true) {
            for (FinishedCopy& done : engine.poll()) {
                CHECK_EQ(done.job, job);
                return done.status;
            }
            std::this_thread::yield();
        }
    };
    Random random(3);
    uint64_t loaded = 0, cancelled = 0;
    uint64_t key = 0;
    auto enough = [&] { return loaded > 100 && cancelled > 0; };
    for (auto begun = Clock::now(); goes_on(begun, enough); ++key) {
        for (uint32_t b = 0; b < kBlocks; ++b) words[b * kBytes / 8] = key * kBlocks + b;
        std::vector<SlotRef> refs = pool.prepare(client, keys_of(key * kBlocks, kBlocks));
        std::vector<CopyBlock> blocks;
        for (uint32_t b = 0; b < kBlocks; ++b) {
            if (!refs[b].none()) blocks.push_back({refs[b], b});
        }
        for (CopyStatus status : finish(engine.submit(Direction::kStore, blocks))) {
            CHECK(status == CopyStatus::kOk);
        }
        pool.owner->complete_store(client, refs);
        LeaseTable leases(*file, client);
        for (CopyBlock& block : blocks) {
            CHECK(leases.take(block.ref));
            block.block += kBlocks;
        }
        uint64_t job = engine.submit(Direction::kLoad, blocks);
        if (below(random, 2) == 0) {
            for (uint64_t i = below(random, 10); i > 0; --i) std::this_thread::yield();
            engine.cancel(job);
            // The memory is ours again: another request's blocks may be written there.
            for (uint32_t b = kBlocks; b < 2 * kBlocks; ++b) words[b * kBytes / 8] = 0;
            for (CopyStatus status : finish(job)) cancelled += status == CopyStatus::kCancelled;
        } else {
            std::vector<CopyStatus> status = finish(job);
            for (size_t i = 0; i < blocks.size(); ++i) {
                CHECK(status[i] == CopyStatus::kOk);
                uint32_t b = blocks[i].block;
                CHECK_EQ(words[b * kBytes / 8], key * kBlocks + b - kBlocks);
                ++loaded;
            }
        }
        for (const CopyBlock& block : blocks) leases.release(block.ref);
    }
    CHECK(enough());
    pool.owner->check_integrity();
}
