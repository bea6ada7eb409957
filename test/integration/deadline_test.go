package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// TestRestoreDeadline starts containers whose caller, as the kubelet on a busy
// node, gives up in the middle of the restore. runc is killed with the call, and
// leaves what it has mounted. Nothing of that stays, no start is refused for
// what could not be undone, and who starts it once more has the container go on,
// or begin anew for a reason; that it was restored is one, where the answer came
// in the very moment in which the caller gave up, and the container was killed.
func TestRestoreDeadline(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	command := shell(`mkdir -p /deep/dir; echo x >/deep/dir/file; ` + counting)
	outcome := map[string]int{}
	for i := range 14 {
		if t.Failed() {
			break
		}
		if len(records(t, key)) == 0 {
			p := n.runPod(key, annotate(key))
			c := p.start("c", "busybox", command)
			c.waitCount(3)
			c.stop(60)
			p.remove()
		}
		p := n.runPod(key, annotate(key))
		c, err := p.tryCreate("c", "busybox", command)
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		ctx, cancel := context.WithTimeout(n.ctx(), time.Duration(20+20*i)*time.Duration(slow)*time.Millisecond)
		_, err = n.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.id})
		cancel()
		if err == nil {
			outcome["in time"]++
			c.waitCount(3)
			c.stop(60)
			p.remove()
			continue
		}
		state := cri.ContainerState_CONTAINER_CREATED
		eventually(t, "end of the start", func() error {
			if state = c.status().State; state == cri.ContainerState_CONTAINER_CREATED {
				return fmt.Errorf("state %v", state)
			}
			return nil
		})
		if state == cri.ContainerState_CONTAINER_RUNNING {
			// The start was faster, the answer was not.
			outcome["in time"]++
			c.waitCount(3)
			c.stop(60)
			p.remove()
			continue
		}
		outcome["given up"]++
		crossed := false // the shim's answer and the end of the wait for it
		for _, e := range events(t, key) {
			if e.Time.Before(begun) {
				continue
			}
			if e.Type == event.RestoreFail && !e.GivenUp() {
				t.Errorf("after %d ms: %s", 20+20*i, e.Reason)
			}
			crossed = crossed || e.Type == event.Restored
		}
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "criu-root") || strings.Contains(line, ".criu.cgyard") {
				t.Errorf("after %d ms is left: %s", 20+20*i, line)
			}
		}
		// containerd 2.4.2 asks for the number of a task's process after it has created
		// the task, and where the caller gives up in between it leaves the task, of which
		// the CRI does not know (plugins/services/tasks/local.go, Create).
		if err := p.tryRemove(); err != nil && strings.Contains(err.Error(), "cannot delete running task") {
			outcome["left by containerd"]++
			run(t, "ctr", "-n", "k8s.io", "tasks", "delete", "--force", c.id)
		} else if err != nil {
			t.Error(err)
		}
		p.remove()

		p = n.runPod(key, annotate(key))
		c = p.start("c", "busybox", command)
		c.waitCount(1)
		c.mustExec("test", "-f", "/deep/dir/file")
		if ns, _ := counts(c.log()); ns[0] == 1 {
			outcome["anew"]++
			if wantOneOf(t, key, event.ColdStart).Reason == "" && !crossed {
				t.Error("it began anew without a reason")
			}
		} else {
			outcome["went on"]++
		}
		c.stop(60)
		p.remove()
	}
	t.Log(outcome)
	if outcome["given up"] < 3 {
		t.Error("hardly a caller gave up")
	}
}

// TestDeleteDeadline: on a node that is so busy that runc needs longer for the deletion
// of an ended container than containerd gives it, the container ends all the same.
func TestDeleteDeadline(t *testing.T) {
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatal(err)
	}
	n, key := newNode(t), uniqueKey(t)
	plain, under := n.runPod(key, nil), n.runPod(key, annotate(key))
	const wrapper = "/usr/local/sbin/runc" // comes first in the shim's PATH
	f, err := os.OpenFile(wrapper, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err == nil {
		_, err = fmt.Fprintf(f, "#!/bin/sh\ncase \" $* \" in *' delete '*) sleep 13 ;; esac\nexec %s \"$@\"\n", runc)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(wrapper); err != nil {
			t.Error(err)
		}
		plain.remove()
		under.remove()
	})
	begin := time.Now()
	both := []*ctr{plain.start("c", "busybox", shell("exit 3")), under.start("c", "busybox", shell("exit 3"))}
	for _, c := range both {
		eventually(t, "end of the container", func() error {
			if s := c.status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 3 {
				return fmt.Errorf("state %v, exit code %d, after %v", s.State, s.ExitCode, time.Since(begin).Round(time.Second))
			}
			return nil
		})
	}
}

// wantOneOf returns the newest event of the type.
func wantOneOf(t *testing.T, key string, typ event.Type) (last event.Event) {
	t.Helper()
	for _, e := range events(t, key) {
		if e.Type == typ {
			last = e
		}
	}
	return last
}
