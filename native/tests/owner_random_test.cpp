// Random verbs against a plain model. After each of them the pool's own integrity holds, it has
// exactly the blocks that the model has, and what it evicted it was allowed to evict.
#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

#ifdef __SANITIZE_THREAD__
constexpr int kSeeds = 2, kSteps = 700;  // one thread: there is little to find, and steps are slow
#else
constexpr int kSeeds = 4, kSteps = 1'500;
#endif

struct Block {
    SlotRef ref;
    uint32_t client;
    uint64_t parent;  // id of the block before it; 0 = none
    uint32_t expiry_s = 0;
    bool pinned = false;
    bool ready = false;
    bool linked = false;  // the pool knows the parent: it goes first
    uint8_t source = 0;   // host that it is a copy of; 0 = none, or a block like any other by now
    int uses = 0;
};

HostId host_of(uint8_t number) {
    return HostId{number};
}

struct Engine {
    std::string id;
    uint32_t name_space;
    uint32_t index = 0;
    std::unique_ptr<HeldLock> lock;
    std::unique_ptr<LeaseTable> leases;
    std::vector<SlotRef> held;  // once for each lease
};

class Model {
  public:
    Model(uint64_t seed, const std::string& policy, uint64_t slabs, uint32_t namespaces)
        : random_(seed), policy_(policy), pool_(slabs, policy), view_(PoolFile::open(pool_.folder.pool())) {
        for (uint32_t i = 0; i < 3; ++i) {
            uint32_t ns = i % namespaces;
            if (ns > 0) pool_.add_namespace(static_cast<uint8_t>(ns + 1), (ns + 1) * kSlotBytes);
            engines_.push_back({"engine-" + std::to_string(i), ns, 0, nullptr, nullptr, {}});
            join(engines_.back());
        }
        // Paths through a tree: every three share their first blocks.
        for (uint64_t i = 0; i < 24; ++i) {
            std::vector<uint64_t> path;
            size_t length = 1 + below(random_, 40), shared = below(random_, 10);
            for (uint64_t at = 0; at < length; ++at) {
                path.push_back((at < shared ? i / 3 * 3 + 1000 : i + 1) * 1'000 + at);
            }
            paths_.push_back(path);
        }
    }

    void step() {
        Engine& engine = engines_[below(random_, engines_.size())];
        uint64_t what = below(random_, 1000);
        if (what < 300) {
            prepare(engine);
        } else if (what < 480) {
            complete(engine);
        } else if (what < 520) {
            abort(engine);
        } else if (what < 600) {
            use(engine);
        } else if (what < 700) {
            lease(engine, use(engine));
        } else if (what < 860) {
            release(engine);
        } else if (what < 890) {
            drop(engine);
        } else if (what < 905) {
            now_s_ += static_cast<uint32_t>(below(random_, 3));
            expect_expired();
            pool_.owner->expire(now_s_);
        } else if (what < 960) {
            evict(engine);
        } else if (what < 970) {
            clear();
        } else if (what < 980) {
            die(engine);
        } else if (what < 985) {
            restart();
        } else if (what < 990) {
            forget_source();
        } else if (what < 994) {
            mark(engine);
        }
        check();
    }
    uint64_t stat(const std::string& name) const { return pool_.stat(name); }

  private:
    // Blocks of different namespaces never have the same key.
    static BlockKey key(uint64_t id, const Engine& engine) { return key_of(id * 64 + engine.name_space); }
    uint64_t id(uint64_t id, const Engine& engine) const { return id * 64 + engine.name_space; }

    void join(Engine& engine) {
        std::string path = pool_.folder.lock(engine.id);
        engine.lock = std::make_unique<HeldLock>(path);
        engine.index = pool_.owner->add_client(engine.id, path, getpid(), engine.name_space);
        engine.leases = std::make_unique<LeaseTable>(view_, engine.index);
    }
    uint64_t slot_bytes(const Engine& engine) const {
        return pool_.owner->file().namespaces()[engine.name_space].slot_bytes.load();
    }

    void prepare(Engine& engine) {
        const auto& path = paths_[below(random_, paths_.size())];
        size_t from = below(random_, path.size());
        size_t count = 1 + below(random_, path.size() - from);
        StoreOptions options;
        if (below(random_, 4) == 0) options.expiry_s = now_s_ + 1 + below(random_, 20);
        options.pin = below(random_, 40) == 0;
        uint8_t source = options.pin || below(random_, 4) == 0 ? 0 : static_cast<uint8_t>(1 + below(random_, 2));
        if (source != 0) options.source = host_of(source);
        std::vector<BlockKey> keys;
        for (size_t i = 0; i < count; ++i) keys.push_back(key(path[from + i], engine));
        std::optional<BlockKey> parent;
        if (from > 0) parent = key(path[from - 1], engine);

        uint64_t moved = stat("slabs_moved");
        auto refs = pool_.prepare(engine.index, keys, parent ? &*parent : nullptr, options, now_s_);
        forget_evicted(from > 0 ? id(path[from - 1], engine) : 0, moved != stat("slabs_moved"));
        bool no_room = false;
        for (size_t i = 0; i < count; ++i) {
            uint64_t block = id(path[from + i], engine);
            uint64_t above = from + i > 0 ? id(path[from + i - 1], engine) : 0;
            bool known = blocks_.count(block) != 0;
            CHECK(!known || refs[i].none());
            CHECK(known || !no_room || refs[i].none());
            if (!known && refs[i].none()) no_room = true;
            if (!refs[i].none()) {
                blocks_[block] = {refs[i], engine.index, above, options.expiry_s, options.pin, false, false, source, 0};
                Pattern::write(view_.payload(refs[i].slot), slot_bytes(engine), keys[i], refs[i].generation);
            }
            link(block, above);
        }
    }

    void complete(Engine& engine) {
        std::vector<SlotRef> refs = take_writing(engine, [](Block& b) { b.ready = true; });
        uint64_t kept = stat("kept_copies");
        CHECK_EQ(pool_.owner->complete_store(engine.index, refs), refs.size());
        if (kept != stat("kept_copies")) find_kept(refs);
    }
    void abort(Engine& engine) {
        std::vector<SlotRef> refs = take_writing(engine, [](Block&) {});
        CHECK_EQ(pool_.owner->abort_store(engine.index, refs), refs.size());
        for (SlotRef ref : refs) forget(find(ref));
    }
    template <class Fn>
    std::vector<SlotRef> take_writing(Engine& engine, Fn fn) {
        std::vector<SlotRef> refs;
        for (auto& [id, block] : blocks_) {
            if (block.ready || block.client != engine.index || below(random_, 3) == 0) continue;
            refs.push_back(block.ref);
            fn(block);
        }
        return refs;
    }

    // The start of a chain that is here, which somebody reads.
    std::vector<SlotRef> use(Engine& engine) {
        const auto& path = paths_[below(random_, paths_.size())];
        std::vector<BlockKey> keys;
        for (uint64_t block : path) keys.push_back(key(block, engine));
        std::vector<SlotRef> refs = pool_.match(keys, now_s_);
        size_t expected = 0;
        for (; expected < path.size(); ++expected) {
            auto found = blocks_.find(id(path[expected], engine));
            if (found == blocks_.end() || !found->second.ready) break;
            if (found->second.expiry_s != 0 && found->second.expiry_s <= now_s_) break;
            CHECK_EQ(refs.at(expected).pack(), found->second.ref.pack());
        }
        CHECK_EQ(refs.size(), expected);
        pool_.owner->touch(refs);
        for (size_t i = 0; i < refs.size(); ++i) {
            Block& block = blocks_.at(id(path[i], engine));
            if (block.source != 0 && ++block.uses == 2) block.source = 0;
            if (i > 0) link(id(path[i], engine), id(path[i - 1], engine));
        }
        return refs;
    }
    void lease(Engine& engine, const std::vector<SlotRef>& refs) {
        for (SlotRef ref : refs) {
            CHECK(engine.leases->take(ref));
            engine.held.push_back(ref);
        }
    }
    void release(Engine& engine) {
        while (!engine.held.empty() && below(random_, 12) != 0) {
            std::swap(engine.held[below(random_, engine.held.size())], engine.held.back());
            SlotRef ref = engine.held.back();
            // Whatever became of the block: while it is leased its bytes are its own.
            CHECK(Pattern::fits(view_.payload(ref.slot), slot_bytes(engine), view_.slots()[ref.slot].load_key(),
                                ref.generation));
            engine.leases->release(ref);
            engine.held.pop_back();
        }
    }

    void drop(Engine& engine) {
        const auto& path = paths_[below(random_, paths_.size())];
        auto found = blocks_.find(id(path[below(random_, path.size())], engine));
        if (found == blocks_.end()) return;
        CHECK_EQ(pool_.owner->drop({found->second.ref}), found->second.ready ? 1u : 0u);
        if (found->second.ready) forget(found->first);
    }
    void expect_expired() {
        for (uint64_t id : ids([&](const Block& b) { return b.ready && b.expiry_s != 0 && b.expiry_s <= now_s_; })) {
            forget(id);
        }
    }
    void evict(Engine& engine) {
        size_t before = blocks_.size(), count = below(random_, 6);
        uint64_t copies = stat("evicted_copies");
        std::set<uint64_t> first = expendable(engine.name_space);
        size_t gone = pool_.owner->evict(engine.name_space, count);
        forget_evicted(0, false);
        copies = stat("evicted_copies") - copies;
        CHECK_EQ(copies, std::min(first.size(), count));
        for (uint64_t id : first) CHECK(gone == copies || blocks_.count(id) == 0);
        CHECK_EQ(before - blocks_.size(), gone);
        CHECK(gone <= count);
    }
    void clear() {
        bool with_pinned = below(random_, 2) == 0;
        std::vector<uint64_t> gone =
            ids([&](const Block& b) { return b.ready && !is_leased(view_, b.ref.slot) && (with_pinned || !b.pinned); });
        CHECK_EQ(pool_.owner->clear(std::nullopt, with_pinned), gone.size());
        for (uint64_t id : gone) forget(id);
    }
    void die(Engine& engine) {
        engine.lock.reset();
        engine.held.clear();
        pool_.owner->reap_clients(now_s_, 1);
        now_s_ += 2;
        CHECK_EQ(pool_.owner->reap_clients(now_s_, 1).size(), 1u);
        for (uint64_t id : ids([&](const Block& b) { return !b.ready && b.client == engine.index; })) {
            forget(id);
        }
        join(engine);
    }
    void restart() {
        pool_.restart(now_s_, policy_);
        expect_expired();
        for (auto& [id, block] : blocks_) {
            link(id, block.parent);
            block.source = 0;
        }
        for (Engine& engine : engines_) engine.leases->check_integrity();
    }

    void forget_source() {
        uint8_t source = static_cast<uint8_t>(1 + below(random_, 2));
        pool_.owner->forget_source(host_of(source));
        for (auto& [id, block] : blocks_) block.source = block.source == source ? 0 : block.source;
    }
    void mark(Engine& engine) {
        const auto& path = paths_[below(random_, paths_.size())];
        uint8_t source = static_cast<uint8_t>(1 + below(random_, 2));
        std::vector<BlockKey> keys;
        size_t expected = 0;
        for (uint64_t number : path) {
            keys.push_back(key(number, engine));
            auto found = blocks_.find(id(number, engine));
            if (found == blocks_.end()) continue;
            Block& block = found->second;
            if (!block.ready || block.pinned || block.source != 0) continue;
            block.source = source;
            block.uses = 1;
            ++expected;
        }
        CHECK_EQ(pool_.owner->mark_copies(keys, host_of(source)), expected);
    }
    // Copies whose key the policy remembers count as used again; only the policy knows which these are.
    void find_kept(const std::vector<SlotRef>& refs) {
        CHECK(policy_ != "lru");
        for (SlotRef ref : refs) {
            Block& block = blocks_.at(find(ref));
            if (!pool_.owner->is_copy(ref.slot)) block.source = 0;
        }
    }
    // Copies that were used once, followed by nothing but such: all of them go before anything else does.
    std::set<uint64_t> expendable(uint32_t name_space) const {
        std::set<uint64_t> found;
        for (size_t before = SIZE_MAX; before != found.size();) {
            before = found.size();
            for (const auto& [id, block] : blocks_) {
                bool copy = block.ready && block.source != 0 && block.uses == 1 && id % 64 == name_space;
                if (copy && !is_leased(view_, block.ref.slot) && followed_by_none_but(found, id)) found.insert(id);
            }
        }
        return found;
    }
    bool followed_by_none_but(const std::set<uint64_t>& expected, uint64_t id) const {
        return std::all_of(blocks_.begin(), blocks_.end(), [&](const auto& other) {
            return other.second.parent != id || !other.second.linked || expected.count(other.first) != 0;
        });
    }

    template <class Fn>
    std::vector<uint64_t> ids(Fn matches) const {
        std::vector<uint64_t> result;
        for (const auto& [id, block] : blocks_) {
            if (matches(block)) result.push_back(id);
        }
        return result;
    }
    uint64_t find(SlotRef ref) const {
        return ids([&](const Block& b) { return b.ref.pack() == ref.pack(); }).at(0);
    }
    void link(uint64_t child, uint64_t parent) {
        if (blocks_.count(child) != 0 && blocks_.count(parent) != 0) blocks_[child].linked = true;
    }
    void forget(uint64_t id) {
        blocks_.erase(id);
        for (auto& [other, block] : blocks_) {
            if (block.parent == id) block.linked = false;
        }
    }

    // `in_use`: the block that a chain was to be continued from.
    void forget_evicted(uint64_t in_use, bool slab_moved) {
        std::vector<uint64_t> gone = ids([&](const Block& b) { return pool_.state(b.ref) == SlotState::kFree; });
        for (uint64_t id : gone) {
            const Block& block = blocks_.at(id);
            CHECK(block.ready && !block.pinned && id != in_use);
            CHECK(!is_leased(view_, block.ref.slot));
        }
        for (uint64_t id : gone) {
            for (const auto& [other, block] : blocks_) {
                bool stays = std::find(gone.begin(), gone.end(), other) == gone.end();
                CHECK(slab_moved || !stays || block.parent != id || !block.linked);
            }
        }
        for (uint64_t id : gone) forget(id);
    }

    void check() {
        pool_.owner->check_integrity();
        uint64_t ready = 0, writing = 0, pinned = 0;
        for (const auto& [id, block] : blocks_) {
            SlotState wanted = block.ready ? SlotState::kReady : SlotState::kWriting;
            CHECK(pool_.state(block.ref) == wanted);
            CHECK(view_.slots()[block.ref.slot].load_key() == key_of(id));
            ++(block.ready ? ready : writing);
            pinned += block.ready && block.pinned;
        }
        std::map<std::string, uint64_t> stats = pool_.owner->stats();
        CHECK_EQ(stats["ready"], ready);
        CHECK_EQ(stats["writing"], writing);
        CHECK_EQ(stats["pinned"], pinned);
        CHECK_EQ(stats["copies"], ids([](const Block& b) { return b.source != 0; }).size());
    }

    Random random_;
    std::string policy_;
    Pool pool_;
    PoolFile view_;
    std::vector<Engine> engines_;
    std::vector<std::vector<uint64_t>> paths_;
    std::map<uint64_t, Block> blocks_;
    uint32_t now_s_ = 10;
};

void run(uint64_t slabs, uint32_t namespaces) {
    uint64_t evicted = 0, no_room = 0, vetoes = 0, moved = 0, copies = 0, kept = 0;
    for (const char* policy : {"lru", "arc", "s3fifo"}) {
        for (int seed = 1; seed <= kSeeds; ++seed) {
            Model model(static_cast<uint64_t>(seed), policy, slabs, namespaces);
            for (int step = 0; step < kSteps; ++step) model.step();
            evicted += model.stat("evicted");
            no_room += model.stat("no_room");
            vetoes += model.stat("lease_vetoes");
            moved += model.stat("slabs_moved");
            copies += model.stat("evicted_copies");
            kept += model.stat("kept_copies");
        }
    }
    if (kSeeds < 4) return;
    // The tests below mean something only while these happen.
    CHECK(evicted > 0 && no_room > 0);
    CHECK(namespaces > 1 || (vetoes > 0 && copies > 0 && kept > 0));
    CHECK(namespaces == 1 || moved > 0);
}

}  // namespace

TEST(one_namespace_in_a_small_pool) {
    run(3, 1);
}

TEST(three_namespaces_share_slabs) {
    run(6, 3);
}
