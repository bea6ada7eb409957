package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// counting prints a counter that only the shell's memory knows, and the host name.
const counting = `n=0; while :; do n=$((n+1)); echo "count $n $(hostname)"; sleep 0.05; done`

var countLine = regexp.MustCompile(`count (\d+) (\S+)`)

// counts returns every number that the log holds, and the last host name.
func counts(log string) (ns []int, hostname string) {
	for _, m := range countLine.FindAllStringSubmatch(log, -1) {
		n, _ := strconv.Atoi(m[1])
		ns, hostname = append(ns, n), m[2]
	}
	return ns, hostname
}

// waitCount waits until the newest count in the log is above n.
func (c *ctr) waitCount(n int) int {
	c.p.n.t.Helper()
	last := 0
	eventually(c.p.n.t, "counter above "+strconv.Itoa(n), func() error {
		ns, _ := counts(c.log())
		if len(ns) == 0 || ns[len(ns)-1] <= n {
			return fmt.Errorf("log ends with %q", tail(c.log(), 200))
		}
		last = ns[len(ns)-1]
		return nil
	})
	return last
}

func tail(s string, n int) string {
	if len(s) > n {
		return s[len(s)-n:]
	}
	return s
}

// memoryVolume mounts a tmpfs as the kubelet does for an emptyDir of medium Memory.
func memoryVolume(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join("/var/lib/kubelet/pods", name, "volumes/kubernetes.io~empty-dir/scratch")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,mode=0777"); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func withMount(host, container string) ctrOption {
	return func(c *cri.ContainerConfig) {
		c.Mounts = append(c.Mounts, &cri.Mount{HostPath: host, ContainerPath: container})
	}
}

// TestResume stops a container and creates it again in another pod: memory,
// writable layer, /dev/shm and a memory-backed volume go on; host name and log
// are the new pod's.
func TestResume(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	v1 := memoryVolume(t, key+"-1")
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting), withMount(v1, "/scratch"))
	c.mustExec("/bin/sh", "-c", `mkdir /d && echo root >/d/f && ln /d/f /d/hard && ln -s f /d/soft && chown 7:8 /d/f &&
		rm -r /etc/passwd && echo shm >/dev/shm/f && echo vol >/scratch/f && chmod 600 /scratch/f`)
	c.waitCount(10)
	c.stop(30)
	st := c.status()
	if st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode == 0 {
		t.Errorf("dumped container: state %v, exit code %d; want exited, not 0", st.State, st.ExitCode)
	}
	dumped := wantEvent(t, key, event.Dumped, "")
	if dumped.SizeBytes <= 0 || dumped.Timings == nil || dumped.Timings.CRIUMicros <= 0 {
		t.Errorf("event without figures: %+v", dumped)
	}
	ns, _ := counts(c.log())
	before := ns[len(ns)-1]
	p.remove()

	v2 := memoryVolume(t, key+"-2")
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting), withMount(v2, "/scratch"))
	after := c.waitCount(before + 5)
	ns, hostname := counts(c.log())
	if ns[0] != before+1 {
		t.Errorf("the new log begins with count %d, want %d", ns[0], before+1)
	}
	if hostname != p.config.Hostname {
		t.Errorf("host name %q, want the new pod's %q", hostname, p.config.Hostname)
	}
	got := c.mustExec("/bin/sh", "-c", `cat /d/f /d/soft /dev/shm/f /scratch/f; stat -c '%u:%g %h %a' /d/f /scratch/f; ls /etc/passwd 2>&1 | grep -c 'No such'; hostname`)
	want := "root\nroot\nshm\nvol\n7:8 2 644\n0:0 1 600\n1\n" + p.config.Hostname
	if got != want {
		t.Errorf("files after restore:\n%s\nwant:\n%s", got, want)
	}
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("state %v", st.State)
	}
	e := wantEvent(t, key, event.Restored, "")
	if e.CheckpointID != dumped.CheckpointID {
		t.Errorf("restored %s, dumped %s", e.CheckpointID, dumped.CheckpointID)
	}
	if left := records(t, key); len(left) != 0 {
		t.Errorf("the checkpoint was not consumed: %v", left)
	}
	t.Logf("count %d in the first pod, %d in the second", before, after)
}

// TestTmpfs: what a container has in /dev, and what is bound from there, is there
// after each restore, although CRIU is given it; nothing of it stays on the node.
func TestTmpfs(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	start := func() *ctr {
		return n.runPod(key, annotate(key)).start("c", "busybox", shell(counting))
	}
	// Of a mount: what, where, how; of a file: what, whose, how large, how old in seconds,
	// which is what tar knows. The mounts of a cgroup begin at the container's own after
	// a restore.
	const look = `cut -d' ' -f4- /proc/self/mountinfo | sed -E 's/ overlay .*//; s/(master|shared):[0-9]*//; s/[0-9a-f-]{32,}/ID/g' | grep -v ' /sys/fs/cgroup/' | sort
		cd /dev && for f in . * shm/*; do stat -c '%n %F %a %u:%g %t:%T %s %Y' "$f"; done | grep -v '^pts\|^mqueue\|^shm '
		cat .config/f; readlink loop; echo x >/dev/null && head -c 1 /proc/kcore | wc -c`
	c := start()
	c.mustExec("/bin/sh", "-c", `cd /dev && mkdir -m 750 .config && echo content >.config/f && chown 7:8 .config/f && chmod 4755 .config/f &&
		ln .config/f hard && ln -s ../etc loop && mkfifo -m 600 fifo && mknod -m 640 zero2 c 1 5 && touch -d 2001-02-03 .config/f .config`)
	want := c.mustExec("/bin/sh", "-c", look)
	for generation := range 2 {
		c.waitCount(3)
		c.stop(30)
		c.p.remove()
		c = start()
		wantEvent(t, key, event.Restored, "")
		if got := c.mustExec("/bin/sh", "-c", look); got != want {
			t.Fatalf("generation %d: got\n%s\nwant\n%s", generation, got, want)
		}
		bundle := filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id)
		b, err := os.ReadFile(filepath.Join(bundle, "work/restore.log"))
		if err != nil || !strings.Contains(string(b), "Bind "+bundle+"/tmpfs/stasis-tmpfs-") {
			t.Errorf("CRIU was given nothing: %v", err)
		}
		noTmpfsLeft(t)
		if _, err := os.Lstat(filepath.Join(bundle, "tmpfs")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left in the bundle: %v", err)
		}
	}
}

// records lists the committed checkpoints of an identity in the namespace default.
func records(t *testing.T, key string) []string {
	t.Helper()
	id := checkpoint.Identity{Namespace: "default", Key: key, Container: "c"}
	m, err := filepath.Glob(filepath.Join(storeRoot, "checkpoints", id.Hash(), "*"))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestTenGenerations stops and restores one container ten times in a row.
func TestTenGenerations(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	last := 0
	for g := range 10 {
		p := n.runPod(key, annotate(key))
		c := p.start("c", "busybox", shell(counting))
		c.waitCount(last + 3)
		if g > 0 {
			ns, _ := counts(c.log())
			if ns[0] != last+1 {
				t.Fatalf("generation %d begins with count %d, want %d", g+1, ns[0], last+1)
			}
			if got := c.mustExec("cat", "/generation"); got != strconv.Itoa(g) {
				t.Fatalf("generation file %q, want %d", got, g)
			}
		}
		c.mustExec("/bin/sh", "-c", fmt.Sprintf("echo %d >/generation", g+1))
		c.stop(30)
		ns, _ := counts(c.log())
		last = ns[len(ns)-1]
		p.remove()
	}
	restored := 0
	for _, e := range events(t, key) {
		if e.Type == event.Restored {
			restored++
		}
	}
	if restored != 9 {
		t.Errorf("%d restores, want 9", restored)
	}
}

// TestRestoredContainerIsWhole uses a restored container as any other: exec,
// stats, limits, an out-of-memory kill with its event.
func TestRestoredContainerIsWhole(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	const limit = 64 << 20
	limited := func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit, CpuShares: 128}
	}
	// The first process itself grows: among several, the kernel may choose another.
	growing := shell(`trap 'x=$(head -c 100000000 /dev/zero | tr "\0" a)' USR1; ` + counting)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", growing, limited)
	c.waitCount(3)
	c.stop(30)
	p.remove()
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", growing, limited)
	wantEvent(t, key, event.Restored, "")
	c.waitCount(5)

	eventually(t, "stats of a restored container", func() error {
		r, err := n.rt.ContainerStats(n.ctx(), &cri.ContainerStatsRequest{ContainerId: c.id})
		if err != nil {
			return err
		}
		if r.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 || r.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
			return fmt.Errorf("no figures: %v", r.Stats)
		}
		return nil
	})
	got := c.memoryLimit()
	if got != strconv.Itoa(limit) {
		t.Errorf("memory limit %q, want %d", got, limit)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil { // version 2
		if got := c.mustExec("cat", "/sys/fs/cgroup/memory.max"); got != strconv.Itoa(limit) {
			t.Errorf("the container sees the memory limit %q, want %d", got, limit)
		}
	}
	c.mustExec("kill", "-USR1", "1")
	eventually(t, "an out-of-memory kill", func() error {
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.Reason != "OOMKilled" {
			return fmt.Errorf("state %v, exit code %d, reason %q", st.State, st.ExitCode, st.Reason)
		}
		return nil
	})
}

// memoryLimit reads the limit that holds for the container from the node's
// side: on cgroup v1 runc shows a restored container another group's files.
func (c *ctr) memoryLimit() string {
	c.p.n.t.Helper()
	pid := c.pid()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		name := filepath.Join("/sys/fs/cgroup/memory", f[2], "memory.limit_in_bytes")
		if f[1] == "" {
			name = filepath.Join("/sys/fs/cgroup", f[2], "memory.max")
		} else if f[1] != "memory" {
			continue
		}
		if b, err := os.ReadFile(name); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	c.p.n.t.Fatalf("no memory cgroup of pid %d in %s", pid, b)
	return ""
}

// pid is the container's first process in the node's pid namespace.
func (c *ctr) pid() int {
	c.p.n.t.Helper()
	r, err := c.p.n.rt.ContainerStatus(c.p.n.ctx(), &cri.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	var info struct{ PID int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.PID <= 0 {
		c.p.n.t.Fatalf("no pid in %v: %v", r.Info, err)
	}
	return info.PID
}

// TestUpdateOfRestored changes the limits of a restored container.
func TestUpdateOfRestored(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	c.stop(30)
	p.remove()
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.Restored, "")
	_, err := n.rt.UpdateContainerResources(n.ctx(), &cri.UpdateContainerResourcesRequest{
		ContainerId: c.id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	got := c.memoryLimit()
	if got != strconv.Itoa(128<<20) {
		t.Errorf("memory limit %q, want %d", got, 128<<20)
	}
}

// TestOptions restores containers under the settings that pods use.
func TestOptions(t *testing.T) {
	for _, tc := range []struct {
		name string
		opt  ctrOption
	}{
		{"plain", func(*cri.ContainerConfig) {}},
		{"tty", func(c *cri.ContainerConfig) { c.Tty = true }},
		{"stdin", func(c *cri.ContainerConfig) { c.Stdin = true }},
		{"non-root", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
			c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1000}
			c.Linux.SecurityContext.NoNewPrivs = true
		}},
		{"read-only-rootfs", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true }},
		{"seccomp-default", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		}},
		{"capabilities-dropped", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
		}},
		{"privileged", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			privileged := func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = tc.name == "privileged" }
			p := n.runPod(key, annotate(key), privileged)
			c := p.start("c", "busybox", shell(counting), tc.opt)
			c.waitCount(5)
			if tc.name == "non-root" && !hasSysResource(t) {
				// CRIU reads the limits of another user's process with prlimit(2),
				// which needs this capability; without it the container must get
				// its signal, and the reason must be told.
				c.stop(1)
				if e := wantEvent(t, key, event.DumpFailed, "criu"); !strings.Contains(e.Reason, "rlimit") {
					t.Errorf("reason %q", e.Reason)
				}
				if st := c.status(); st.ExitCode != 137 {
					t.Errorf("exit code %d", st.ExitCode)
				}
				return
			}
			c.stop(30)
			wantEvent(t, key, event.Dumped, "")
			ns, _ := counts(c.log())
			before := ns[len(ns)-1]
			p.remove()
			p = n.runPod(key, annotate(key), privileged)
			c = p.start("c", "busybox", shell(counting), tc.opt)
			wantEvent(t, key, event.Restored, "")
			c.waitCount(before + 3)
			ns, hostname := counts(c.log())
			if ns[0] <= before {
				t.Errorf("began anew: count %d after %d", ns[0], before)
			}
			if hostname != p.config.Hostname {
				t.Errorf("host name %q, want %q", hostname, p.config.Hostname)
			}
			c.mustExec("true")
			c.stop(30)
			wantEvent(t, key, event.Dumped, "")
		})
	}
}

// hasSysResource tells whether this machine gives root CAP_SYS_RESOURCE.
func hasSysResource(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("no CapEff")
	return false
}

// TestPodOfTwoContainers restores both containers of a pod that share /dev/shm
// and a memory-backed volume.
func TestPodOfTwoContainers(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	for round := range 2 {
		v := memoryVolume(t, fmt.Sprintf("%s-%d", key, round))
		p := n.runPod(key, annotate(key))
		a := p.start("c", "busybox", shell(counting), withMount(v, "/scratch"))
		b := p.start("other", "busybox", shell(counting), withMount(v, "/scratch"))
		if round == 0 {
			a.mustExec("/bin/sh", "-c", "echo from-a >/scratch/a; echo from-a >/dev/shm/a")
			b.mustExec("/bin/sh", "-c", "echo from-b >/scratch/b; echo from-b >/dev/shm/b")
			a.waitCount(20)
			b.waitCount(20)
			a.stop(30)
			b.stop(30)
		} else {
			for _, c := range []*ctr{a, b} {
				c.waitCount(21)
				ns, _ := counts(c.log())
				if ns[0] < 20 {
					t.Errorf("%s began anew with count %d", c.config.Metadata.Name, ns[0])
				}
				got := c.mustExec("cat", "/scratch/a", "/scratch/b", "/dev/shm/a", "/dev/shm/b")
				if got != "from-a\nfrom-b\nfrom-a\nfrom-b" {
					t.Errorf("%s sees %q", c.config.Metadata.Name, got)
				}
			}
		}
		p.remove()
	}
}

// TestExecAtStop stops a container in which an exec is running: the exec is
// lost and named, the container goes on.
func TestExecAtStop(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	done := make(chan error, 1)
	go func() {
		_, err := c.exec("sleep", "15")
		done <- err
	}()
	eventually(t, "the exec process", func() error {
		out, err := c.exec("pidof", "sleep")
		if err == nil && len(strings.Fields(out)) < 1 {
			return fmt.Errorf("pids %q", out)
		}
		return err
	})
	time.Sleep(300 * time.Millisecond)
	c.stop(30)
	<-done
	e := wantEvent(t, key, event.Dumped, "")
	m := readManifest(t, records(t, key)[0])
	if len(m.Lost) != 1 || !strings.HasPrefix(m.Lost[0], "exec process") {
		t.Errorf("checkpoint %s lists as lost %q, want the exec process", e.CheckpointID, m.Lost)
	}
	p.remove()
	p = n.runPod(key, annotate(key))
	p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.Restored, "")
}

func readManifest(t *testing.T, dir string) *checkpoint.Manifest {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, checkpoint.ManifestFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := checkpoint.ReadManifest(f)
	if err != nil {
		t.Fatal(err)
	}
	return m
}
