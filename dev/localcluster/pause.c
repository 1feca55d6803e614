/* The process that holds a pod's namespaces: reaps children, ends on SIGTERM. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void stop(int signal_number)
{
    (void)signal_number;
    _exit(0);
}

static void ignore(int signal_number) { (void)signal_number; }

int main(void)
{
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    signal(SIGCHLD, ignore); /* a handler, so that pause() returns when a child ends */
    for (;;) {
        pause();
        while (waitpid(-1, 0, WNOHANG) > 0) {
        }
    }
}
