package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
)

const (
	runcRoot = "/run/bench-runc"
	tasks    = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
)

// bundle is a bundle for `runc restore` in a pod of the node: the spec is that
// of a container which the CRI has made there, with an overlay of its own over
// the same image, and the template's writable layer in it.
type bundle struct {
	dir, id string
	daemon  *exec.Cmd // CRIU's lazy-pages daemon
	pipes   []*os.File
	mounted bool
	created bool
}

// runc measures `runc restore` of the template's images.
func (n *node) runc(ctx context.Context, t *template, set settings, lazy bool) (x timing, err error) {
	ctx, cancel := context.WithTimeout(ctx, set.Window+stepTimeout)
	defer cancel()
	p, err := n.pod(ctx, t.service.short, map[string]string{checkpoint.AnnotationPolicy: "template"})
	if err != nil {
		return x, err
	}
	defer func() { err = errors.Join(err, p.remove(ctx)) }()
	b, err := p.bundle(ctx, t)
	if b != nil {
		defer func() { err = errors.Join(err, b.remove(ctx)) }()
	}
	if err != nil {
		return x, fmt.Errorf("bundle: %w", err)
	}
	if lazy {
		if err := b.serve(ctx, t); err != nil {
			return x, err
		}
	}
	asking, stop := context.WithCancel(ctx)
	defer stop()
	answered := make(chan error, 1)
	var first time.Time
	begin := time.Now()
	go func() {
		var err error
		first, err = t.service.firstAnswer(asking, p.address, t.answers)
		answered <- err
	}()
	if err := b.restore(ctx, t, lazy); err != nil {
		stop()
		<-answered
		return x, err
	}
	x.started = ms(time.Since(begin))
	if err := <-answered; err != nil {
		return x, err
	}
	x.first, x.container = ms(first.Sub(begin)), b.id
	if set.Window > 0 {
		x.requests, x.fill, err = t.service.after(ctx, p.address, b.id, t.answers, set)
	}
	return x, err
}

// bundle makes a bundle in the pod. What it made so far is returned with an
// error too.
func (p *pod) bundle(ctx context.Context, t *template) (*bundle, error) {
	idle := t.service
	idle.command = []string{"busybox", "sleep", "3600"}
	id, err := p.create(ctx, idle)
	if err != nil {
		return nil, err
	}
	if _, err := p.n.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id}); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(storeRoot, "bench-")
	if err != nil {
		return nil, err
	}
	b := &bundle{dir: dir, id: filepath.Base(dir)}
	for _, name := range []string{"upper", "work", "rootfs", "criu"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return b, err
		}
	}
	lower, err := lowerDirs(filepath.Join(tasks, id, "rootfs"))
	if err != nil {
		return b, err
	}
	if f, err := os.Open(filepath.Join(t.dir, checkpoint.RootfsDiffFile)); err == nil {
		_, err = layer.Apply(ctx, f, filepath.Join(dir, "upper"), layer.Options{AllowDevices: true})
		if err = errors.Join(err, f.Close()); err != nil {
			return b, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return b, err
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)
	if err := unix.Mount("overlay", filepath.Join(dir, "rootfs"), "overlay", 0, options); err != nil {
		return b, fmt.Errorf("mount overlay: %w", err)
	}
	b.mounted = true
	return b, b.writeSpec(filepath.Join(tasks, id, "config.json"))
}

// lowerDirs are those of the overlay that is mounted there.
func lowerDirs(at string) (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 7 || f[4] != at {
			continue
		}
		for option := range strings.SplitSeq(f[len(f)-1], ",") {
			if dirs, ok := strings.CutPrefix(option, "lowerdir="); ok && strings.HasPrefix(dirs, "/") {
				return dirs, nil
			}
		}
	}
	return "", fmt.Errorf("no overlay at %s", at)
}

// writeSpec writes the container's spec with a root, a cgroup and a CRIU
// configuration of the bundle's own. The options are those with which stasis
// restores.
func (b *bundle) writeSpec(from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if s.Root == nil || s.Linux == nil {
		return fmt.Errorf("%s: no root or not of Linux", from)
	}
	s.Root.Path = filepath.Join(b.dir, "rootfs")
	s.Linux.CgroupsPath = "/bench/" + b.id
	config := filepath.Join(b.dir, "criu.conf")
	if err := os.WriteFile(config, []byte("tcp-close\nfile-locks\next-unix-sk\n"), 0o600); err != nil {
		return err
	}
	s.Annotations["org.criu.config"] = config
	if data, err = json.Marshal(s); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, "config.json"), data, 0o600)
}

// serve starts CRIU's lazy-pages daemon and waits until it listens.
func (b *bundle) serve(ctx context.Context, t *template) error {
	work := filepath.Join(b.dir, "criu")
	b.daemon = exec.CommandContext(ctx, "criu", "lazy-pages", "--images-dir", filepath.Join(t.dir, checkpoint.ImageDir), "--work-dir", work, "--log-file", "lazy.log")
	if err := b.daemon.Start(); err != nil {
		return err
	}
	for range 5000 {
		if _, err := os.Stat(filepath.Join(work, "lazy-pages.socket")); err == nil {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("CRIU's lazy-pages daemon does not listen")
}

func (b *bundle) restore(ctx context.Context, t *template, lazy bool) error {
	args := []string{"--root", runcRoot, "restore", "--detach", "--bundle", b.dir,
		"--image-path", filepath.Join(t.dir, checkpoint.ImageDir), "--work-path", filepath.Join(b.dir, "criu")}
	if lazy {
		args = append(args, "--lazy-pages")
	}
	cmd := exec.CommandContext(ctx, "runc", append(args, b.id)...)
	// Pipes, as the dumped container had: CRIU puts them in the place of those.
	for _, to := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		b.pipes = append(b.pipes, r)
		defer w.Close()
		*to = w
		go io.Copy(io.Discard, r) // ends when remove closes it
	}
	b.created = true
	if err := cmd.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(b.dir, "criu", "restore.log"))
		return fmt.Errorf("runc restore: %w: %s", err, errorLines(string(log)))
	}
	return nil
}

// errorLines are the last lines of a log of CRIU that tell of errors.
func errorLines(log string) string {
	var lines []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, "Error") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}

// remove ends the container before the daemon that has its memory.
func (b *bundle) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTimeout)
	defer cancel()
	var errs []error
	if b.created {
		if out, err := exec.CommandContext(ctx, "runc", "--root", runcRoot, "delete", "--force", b.id).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("runc delete: %w: %s", err, out))
		}
	}
	if b.daemon != nil {
		b.daemon.Process.Kill()
		b.daemon.Wait() // killed, or ended by itself
	}
	for _, p := range b.pipes {
		p.Close()
	}
	if b.mounted {
		errs = append(errs, unix.Unmount(filepath.Join(b.dir, "rootfs"), unix.MNT_DETACH))
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}
