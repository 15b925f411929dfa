// All that the tests need of a framework: TEST(name) { CHECK(...); }. A program runs its tests in
// order, or those whose names contain its first argument; the exit status counts the failed.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registration {
    Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class T>
std::string text(const T& value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

template <class Left, class Right>
void equal(const Left& left, const Right& right, const char* file, int line, const char* what) {
    if (left == right) return;
    fail(file, line, what + (": " + text(left)) + " and " + text(right));
}

}  // namespace check

#define TEST(name)                                                     \
    static void name();                                                \
    static const check::Registration registration_##name{#name, name}; \
    static void name()

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
    } while (false)

#define CHECK_EQ(left, right) check::equal((left), (right), __FILE__, __LINE__, #left " == " #right)

#define CHECK_THROWS(Type, expression)                                           \
    do {                                                                         \
        bool thrown = false;                                                     \
        try {                                                                    \
            (void)(expression);                                                  \
        } catch (const Type&) {                                                  \
            thrown = true;                                                       \
        }                                                                        \
        if (!thrown) check::fail(__FILE__, __LINE__, #expression ": no " #Type); \
    } while (false)

int main(int argc, char** argv) {
    int failed = 0;
    for (const check::Test& test : check::tests()) {
        if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
        try {
            test.body();
            std::printf("ok    %s\n", test.name);
        } catch (const std::exception& error) {
            ++failed;
            std::printf("FAIL  %s\n      %s\n", test.name, error.what());
        }
        std::fflush(stdout);
    }
    return failed;
}
