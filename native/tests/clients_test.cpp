// Liveness as the kernel tells it, with real processes.
#include "kvpool/clients.h"

#include <signal.h>
#include <sys/wait.h>

#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

struct Clients {
    Folder folder;
    PoolFile file;
    std::unique_ptr<ClientTable> table;

    Clients() : file(PoolFile::create(folder.pool(), Geometry::plan(8 * kMiB, kSlotBytes), 0600)) { reload(); }
    void reload() { table = std::make_unique<ClientTable>(file); }
    ClientTable* operator->() { return table.get(); }
    uint32_t add(const std::string& id, int pid = getpid()) { return table->add(id, folder.lock(id), pid, 0).value(); }
};

// A process that holds the locks of these clients and does nothing else.
class Holder {
  public:
    explicit Holder(const std::vector<std::string>& paths) {
        int ready[2];
        if (pipe(ready) != 0) throw_errno("pipe");
        pid_ = fork();
        if (pid_ == 0) {
            std::vector<std::unique_ptr<HeldLock>> locks;
            for (const std::string& path : paths) locks.push_back(std::make_unique<HeldLock>(path));
            if (write(ready[1], "!", 1) != 1) _exit(1);
            while (true) pause();
        }
        close(ready[1]);
        char byte;
        if (read(ready[0], &byte, 1) != 1) throw_errno("read");
        close(ready[0]);
    }
    ~Holder() { kill(); }
    void signal(int number) const { ::kill(pid_, number); }
    void kill() {
        if (pid_ <= 0) return;
        signal(SIGKILL);
        waitpid(pid_, nullptr, 0);
        pid_ = 0;
    }
    int pid() const { return pid_; }

  private:
    pid_t pid_;
};

std::vector<uint32_t> none() {
    return {};
}
std::vector<uint32_t> one(uint32_t client) {
    return {client};
}

}  // namespace

TEST(a_killed_engine_is_dead_after_the_grace) {
    Clients clients;
    Holder engine({clients.folder.lock("a")});
    uint32_t a = clients.add("a", engine.pid());
    CHECK(clients->dead(100, 0) == none());
    engine.kill();
    CHECK(clients->dead(101, 2) == none());  // seen dead; a DMA may still be in flight
    CHECK(clients->dead(103, 2) == none());
    CHECK(clients->dead(104, 2) == one(a));
    clients->remove(a);
    CHECK(clients->dead(200, 2) == none());
    CHECK(access(clients.folder.lock("a").c_str(), F_OK) != 0);
}

TEST(a_stopped_engine_is_alive) {
    Clients clients;
    Holder engine({clients.folder.lock("a")});
    clients.add("a", engine.pid());
    engine.signal(SIGSTOP);
    for (uint32_t now_s = 0; now_s < 100'000; now_s += 1'000) {
        CHECK(clients->dead(now_s, 0) == none());
    }
    engine.signal(SIGCONT);
    CHECK(clients->dead(200'000, 0) == none());
}

TEST(an_engine_lives_as_long_as_any_of_its_processes) {
    Clients clients;
    std::string lock = clients.folder.lock("a");
    Holder scheduler({lock}), worker({lock});
    uint32_t a = clients.add("a", scheduler.pid());
    scheduler.kill();
    CHECK(clients->dead(10, 0) == none());
    worker.kill();
    CHECK(clients->dead(20, 0) == none());
    CHECK(clients->dead(21, 0) == one(a));
}

TEST(one_engine_does_not_die_with_another) {
    Clients clients;
    Holder first({clients.folder.lock("a")}), second({clients.folder.lock("b")});
    uint32_t a = clients.add("a"), b = clients.add("b");
    CHECK(a != b);
    first.kill();
    clients->dead(0, 0);
    CHECK(clients->dead(1, 0) == one(a));
    clients->remove(a);
    CHECK(clients->all() == one(b));
}

TEST(a_client_keeps_its_index_and_its_leases) {
    Clients clients;
    HeldLock lock(clients.folder.lock("a"));
    uint32_t a = clients.add("a", 1);
    clients.file.bitmap(a)[0].store(7);
    CHECK_EQ(clients.add("a", 2), a);
    CHECK_EQ(count_leases(clients.file, a), 3u);
    CHECK_EQ(clients.file.clients()[a].pid.load(), 2);
}

TEST(a_new_client_begins_without_leases) {
    Clients clients;
    std::string path = clients.folder.lock("a");
    uint32_t a;
    {
        HeldLock lock(path);
        a = clients.add("a");
        clients.file.bitmap(a)[0].store(7);
    }
    clients->dead(0, 0);
    CHECK(clients->dead(1, 0) == one(a));
    clients->remove(a);
    CHECK_EQ(count_leases(clients.file, a), 0u);
    clients.file.bitmap(a)[0].store(7);  // a process that was not quite dead
    HeldLock lock(clients.folder.lock("b"));
    CHECK_EQ(clients.add("b"), a);
    CHECK_EQ(count_leases(clients.file, a), 0u);
}

TEST(the_next_daemon_finds_them) {
    Clients clients;
    Holder engine({clients.folder.lock("a"), clients.folder.lock("b")});
    uint32_t a = clients.add("a"), b = clients.add("b");
    clients.reload();
    for (uint32_t i : {a, b}) clients->adopt(i, clients.folder.lock(clients->id(i)));
    CHECK(clients->dead(0, 0) == none());
    engine.kill();
    clients->dead(1, 0);
    CHECK(clients->dead(2, 0) == std::vector<uint32_t>({a, b}));
}

TEST(without_a_lock_file_the_process_number_must_do) {
    Clients clients;
    auto engine = std::make_unique<Holder>(std::vector{clients.folder.lock("a")});
    uint32_t a = clients.add("a", engine->pid());
    unlink(clients.folder.lock("a").c_str());
    clients.reload();
    clients->adopt(a, clients.folder.lock("a"));
    clients->dead(0, 0);
    CHECK(clients->dead(1, 0) == none());
    engine.reset();
    clients->dead(2, 0);
    CHECK(clients->dead(3, 0) == one(a));
}

// Somebody cleans up by hand; the engine notices and locks a new file of that name.
TEST(a_lock_file_that_was_made_anew_counts) {
    Clients clients;
    std::string path = clients.folder.lock("a");
    auto before = std::make_unique<HeldLock>(path);
    uint32_t a = clients.add("a");
    unlink(path.c_str());
    CHECK(clients->dead(0, 0) == none());
    auto after = std::make_unique<HeldLock>(path);
    CHECK(clients->dead(1, 0) == none());
    before.reset();
    for (uint32_t now_s : {2, 3, 9}) CHECK(clients->dead(now_s, 0) == none());
    after.reset();
    clients->dead(10, 0);
    CHECK(clients->dead(11, 0) == one(a));
}

// We held its lock exclusively by then: it comes back under a new file.
TEST(a_client_that_comes_back_within_the_grace_is_alive) {
    Clients clients;
    std::string path = clients.folder.lock("a");
    auto before = std::make_unique<HeldLock>(path);
    clients.add("a");
    before.reset();
    CHECK(clients->dead(0, 5) == none());
    unlink(path.c_str());
    HeldLock after(path);
    for (uint32_t now_s : {5, 6, 100}) CHECK(clients->dead(now_s, 5) == none());
}

TEST(what_cannot_be_a_client_is_refused) {
    Clients clients;
    CHECK_THROWS(std::invalid_argument, clients.add(""));
    CHECK_THROWS(std::invalid_argument, clients.add(std::string(44, 'x')));
    for (int i = 0; i < 5'000; ++i) CHECK_THROWS(std::system_error, clients.add("no-lock-file"));
    CHECK(clients->all() == none());
    HeldLock lock(clients.folder.lock("a"));
    CHECK_EQ(clients.add("a"), 0u);
}

TEST(a_full_table_says_so) {
    Clients clients;
    std::vector<std::unique_ptr<HeldLock>> locks;
    for (uint32_t i = 0; i < kMaxClients; ++i) {
        std::string id = "client-" + std::to_string(i);
        locks.push_back(std::make_unique<HeldLock>(clients.folder.lock(id)));
        CHECK_EQ(clients.add(id), i);
    }
    locks.push_back(std::make_unique<HeldLock>(clients.folder.lock("more")));
    CHECK(!clients->add("more", clients.folder.lock("more"), 1, 0));
    CHECK_EQ(clients.add("client-200"), 200u);
    CHECK_EQ(clients->all().size(), kMaxClients);
}

TEST(a_damaged_table_is_refused) {
    Clients clients;
    HeldLock lock(clients.folder.lock("a"));
    uint32_t a = clients.add("a");
    clients.file.clients()[a].name_space.store(kMaxNamespaces);
    CHECK_THROWS(PoolFormatError, clients.reload());
    clients.file.clients()[a].name_space.store(0);
    clients.file.header().clients_high.store(kMaxClients + 1);
    CHECK_THROWS(PoolFormatError, clients.reload());
}
