package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

// world is what each scenario begins with: three generations of alice and one
// checkpoint of bob, all durable.
type world struct {
	old, middle, newest, other checkpoint.ID
	next                       *checkpoint.Manifest // to be committed
}

const where = "/var/lib/stasis"

// scenario is one operation under test. States in the maps are by a name of
// world; "" stands for absent.
type scenario struct {
	// prepare makes what run needs, undisturbed. It may be nil.
	prepare func(t *testing.T, s *Store, w world)
	// run is disturbed. It must be fit to be run again after an error.
	run func(ctx context.Context, s *Store, w world) error
	// before is the state of what run changes until it does, after once it
	// returned nil; in between both may be. All else must stay as it was.
	before, after map[string]State
}

func (w world) name(id checkpoint.ID) string {
	switch id {
	case w.old:
		return "old"
	case w.middle:
		return "middle"
	case w.newest:
		return "newest"
	case w.other:
		return "other"
	case w.next.ID:
		return "next"
	}
	return "stranger " + string(id)
}

func claimNewest(ctx context.Context, s *Store, w world) (*Claim, error) {
	return s.Claim(ctx, w.newest, "container")
}

// held continues a claim of this process, as the one who made it would.
func held(s *Store, w world) *Claim {
	return &Claim{s: s, id: w.newest, dir: s.claimedPath(w.newest)}
}

func prepareClaim(t *testing.T, s *Store, w world) {
	_, err := claimNewest(t.Context(), s, w)
	must(t, err)
}

// shop is the template that next is made of.
const shop = "shop"

func (w world) template() TemplateRef { return TemplateRef{alice.Namespace, shop, w.next.ID} }

func prepareTemplate(t *testing.T, s *Store, w world) {
	m := *w.next
	m.Template = shop
	must(t, commit(t.Context(), s, &m))
}

// gone makes a retry of something that removes fit for a second success.
func gone(err error) error {
	if errors.Is(err, checkpoint.ErrNotFound) {
		return nil
	}
	return err
}

var scenarios = map[string]scenario{
	"commit": {
		run: func(ctx context.Context, s *Store, w world) error {
			m := *w.next
			return commit(ctx, s, &m)
		},
		before: map[string]State{"next": ""}, after: map[string]State{"next": Committed},
	},
	"claim": {
		run: func(ctx context.Context, s *Store, w world) error {
			_, err := claimNewest(ctx, s, w)
			return err
		},
		before: map[string]State{"newest": Committed}, after: map[string]State{"newest": Claimed},
	},
	"release": {
		prepare: prepareClaim,
		run:     func(ctx context.Context, s *Store, w world) error { return held(s, w).Release(ctx) },
		before:  map[string]State{"newest": Claimed}, after: map[string]State{"newest": Committed},
	},
	"consume": {
		prepare: prepareClaim,
		run:     func(ctx context.Context, s *Store, w world) error { return held(s, w).Consume(ctx) },
		before:  map[string]State{"newest": Claimed}, after: map[string]State{"newest": ""},
	},
	"quarantine a claim": {
		prepare: prepareClaim,
		run: func(ctx context.Context, s *Store, w world) error {
			return held(s, w).Quarantine(ctx, "reason", map[string][]byte{"restore.log": []byte("log")})
		},
		before: map[string]State{"newest": Claimed}, after: map[string]State{"newest": Quarantined},
	},
	"quarantine": {
		run: func(ctx context.Context, s *Store, w world) error {
			return s.Quarantine(ctx, w.newest, "reason", map[string][]byte{"restore.log": []byte("log")})
		},
		before: map[string]State{"newest": Committed}, after: map[string]State{"newest": Quarantined},
	},
	"remove the last": {
		run:    func(ctx context.Context, s *Store, w world) error { return gone(s.Remove(ctx, w.other)) },
		before: map[string]State{"other": Committed}, after: map[string]State{"other": ""},
	},
	"gc": {
		run: func(ctx context.Context, s *Store, w world) error {
			_, err := s.GC(ctx, Policy{KeepPerIdentity: 1}, false)
			return err
		},
		before: map[string]State{"old": Committed, "middle": Committed}, after: map[string]State{"old": "", "middle": ""},
	},
	"commit a template": {
		run: func(ctx context.Context, s *Store, w world) error {
			m := *w.next
			m.Template = shop
			return commit(ctx, s, &m)
		},
		before: map[string]State{"next": ""}, after: map[string]State{"next": isTemplate},
	},
	"pin a template": {
		prepare: prepareTemplate,
		run: func(ctx context.Context, s *Store, w world) error {
			pin, err := s.PinTemplate(ctx, w.template(), "container")
			if err != nil {
				return err
			}
			return errors.Join(pin.Verify(ctx, nil), pin.Release(ctx))
		},
		before: map[string]State{"next": isTemplate}, after: map[string]State{"next": isTemplate},
	},
	"remove a template": {
		prepare: prepareTemplate,
		run:     func(ctx context.Context, s *Store, w world) error { return gone(s.RemoveTemplate(ctx, w.template())) },
		before:  map[string]State{"next": isTemplate}, after: map[string]State{"next": ""},
	},
	"quarantine a template": {
		prepare: prepareTemplate,
		run: func(ctx context.Context, s *Store, w world) error {
			return s.QuarantineTemplate(ctx, w.template(), "reason", nil)
		},
		before: map[string]State{"next": isTemplate}, after: map[string]State{"next": Quarantined},
	},
	"take back a stale claim": {
		prepare: func(t *testing.T, s *Store, w world) {
			self := s.self
			s.self.BootID = "an earlier one"
			prepareClaim(t, s, w)
			s.self = self
		},
		run: func(ctx context.Context, s *Store, w world) error {
			m, err := s.Latest(ctx, alice)
			if err == nil && m.ID != w.newest {
				return fmt.Errorf("latest is %s: %w", w.name(m.ID), checkpoint.ErrCorrupt)
			}
			return err
		},
		before: map[string]State{"newest": Claimed}, after: map[string]State{"newest": Committed},
	},
	"sweep": {
		prepare: func(t *testing.T, s *Store, w world) {
			self := s.self
			s.self.BootID = "an earlier one"
			prepareClaim(t, s, w)
			g, err := s.Stage(t.Context(), w.next.ID)
			must(t, err)
			must(t, fill(s.fs, g.Dir(), w.next.ID))
			_, err = s.trash(s.committedPath(w.other))
			must(t, err)
			s.self = self
		},
		run: func(ctx context.Context, s *Store, w world) error {
			_, err := s.Sweep(ctx)
			return err
		},
		before: map[string]State{"newest": Claimed, "other": ""}, after: map[string]State{"newest": Committed, "other": ""},
	},
}

// begin makes the world, with the scenario's preparation, on a fresh disk.
func begin(t *testing.T, sc scenario) (*fsys.Mem, world) {
	mem := fsys.NewMem()
	s, err := Open(mem, where)
	must(t, err)
	w := world{old: mustCommit(t, s, alice, 1), middle: mustCommit(t, s, alice, 2), newest: mustCommit(t, s, alice, 3),
		other: mustCommit(t, s, bob, 1), next: manifestFor(alice, 4)}
	if sc.prepare != nil {
		sc.prepare(t, s, w)
	}
	return mem.CrashClone(1, newRand()), w
}

func newRand() *rand.Rand { return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())) }

// open opens the store on a file system; after a reboot all owners are dead.
func open(t *testing.T, f fsys.FS, rebooted bool) *Store {
	t.Helper()
	s, err := Open(f, where)
	must(t, err)
	if rebooted {
		s.self.BootID = "the next one"
	}
	return s
}

// check compares the store, every checkpoint of which it verifies, with what
// must be there; what the scenario changes must be in one of the given states.
func (sc scenario) check(t *testing.T, s *Store, w world, allowed ...map[string]State) {
	t.Helper()
	got := map[string]State{}
	for id, state := range states(t, s) {
		got[w.name(id)] = state
	}
	want := map[string][]State{}
	for _, name := range []string{"old", "middle", "newest", "other"} {
		want[name] = []State{Committed}
	}
	want["next"] = []State{""}
	for name := range sc.before {
		want[name] = nil
		for _, a := range allowed {
			want[name] = append(want[name], a[name])
		}
	}
	for name, states := range want {
		ok := false
		for _, state := range states {
			ok = ok || got[name] == state
		}
		if !ok {
			t.Errorf("%s is %q, want one of %q", name, got[name], states)
		}
		delete(got, name)
	}
	for name, state := range got {
		t.Errorf("%s is %s", name, state)
	}
}

// afterReboot is what claims turn into.
func afterReboot(m map[string]State) map[string]State {
	out := map[string]State{}
	for name, state := range m {
		if state == Claimed {
			state = Committed
		}
		out[name] = state
	}
	return out
}

// TestCrash lets the power fail at each file operation of each scenario.
func TestCrash(t *testing.T) {
	for name, sc := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rnd := newRand()
			mem, w := begin(t, sc)
			type crash struct {
				at   string
				keep float64
				mem  *fsys.Mem
			}
			var crashes []crash
			crashNow := func(at string) {
				for _, keep := range []float64{0, 0.5, 0.5, 0.5, 1} {
					crashes = append(crashes, crash{at, keep, mem.CrashClone(keep, rnd)})
				}
			}
			n := 0
			s := open(t, mem, false)
			s.workers = 1 // one after the other, as the crashes are taken
			s.fs = fsys.Hook(mem, func(op, path string) error {
				crashNow(fmt.Sprintf("%d %s %s", n, op, path))
				n++
				return nil
			})
			must(t, sc.run(t.Context(), s, w))
			during := len(crashes)
			crashNow("the end")
			if n < 5 {
				t.Fatalf("only %d operations", n)
			}
			before, after := afterReboot(sc.before), afterReboot(sc.after)
			for i, c := range crashes {
				what := fmt.Sprintf("crash before %s, keeping %v of what is unsynced", c.at, c.keep)
				s := open(t, c.mem, true)
				if _, err := s.Sweep(t.Context()); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				tidy(t, s)
				if i < during {
					sc.check(t, s, w, before, after)
				} else {
					sc.check(t, s, w, after)
				}
				if m, err := s.Latest(t.Context(), alice); err != nil {
					t.Errorf("%s: latest: %v", what, err)
				} else if err := s.Verify(t.Context(), m.ID); err != nil {
					t.Errorf("%s: latest: %v", what, err)
				}
				// Life goes on, on the same disk.
				id := mustCommit(t, s, alice, 50)
				cl, err := s.Claim(t.Context(), id, "c")
				must(t, err)
				must(t, cl.Consume(t.Context()))
				if t.Failed() {
					t.Fatal(what)
				}
			}
			t.Logf("%d operations, %d crashes", n, len(crashes))
		})
	}
}

// TestFailingOperation lets each file operation of each scenario fail once:
// then nothing is lost and trying again works. Or the operation knew better.
func TestFailingOperation(t *testing.T) {
	for name, sc := range scenarios {
		for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
			t.Run(fmt.Sprintf("%s/%v", name, errno), func(t *testing.T) {
				t.Parallel()
				base, w := begin(t, sc)
				n, failed := int64(0), 0
				for ; ; n++ {
					mem := base.CrashClone(1, newRand())
					s := open(t, mem, false)
					s.workers = 1
					var at string
					hook, reached := fsys.FailNth(n, errno)
					s.fs = fsys.Hook(mem, func(op, path string) error {
						err := hook(op, path)
						if err != nil {
							at = op + " " + path
						}
						return err
					})
					err := sc.run(t.Context(), s, w)
					done := !reached()
					s.fs = mem
					what := fmt.Sprintf("operation %d, %s, failed: got %v", n, at, err)
					if err != nil {
						failed++
						if !errors.Is(err, errno) {
							t.Errorf("%s: cause is lost", what)
						}
						switch name {
						case "gc", "quarantine", "quarantine a claim", "quarantine a template", "sweep", "take back a stale claim": // these have steps
							sc.check(t, s, w, sc.before, sc.after)
						default:
							sc.check(t, s, w, sc.before)
						}
						if err := sc.run(t.Context(), s, w); err != nil {
							t.Errorf("%s: and again: %v", what, err)
						}
					}
					sc.check(t, s, w, sc.after)
					// What was left behind does not stay for ever.
					s = open(t, mem, true)
					_, err = s.Sweep(t.Context())
					must(t, err)
					tidy(t, s)
					sc.check(t, s, w, afterReboot(sc.after))
					if t.Failed() {
						t.Fatal(what)
					}
					if done {
						break
					}
				}
				if failed < 3 {
					t.Fatalf("only %d of %d operations failed", failed, n)
				}
				t.Logf("%d operations, %d failures seen by the caller", n, failed)
			})
		}
	}
}

// TestDyingDisk lets each file operation and all after it fail, and reads what
// is on the disk after a reboot.
func TestDyingDisk(t *testing.T) {
	for name, sc := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base, w := begin(t, sc)
			for n := 0; ; n++ {
				mem := base.CrashClone(1, newRand())
				s := open(t, mem, false)
				s.workers = 1
				count := 0
				s.fs = fsys.Hook(mem, func(op, path string) error {
					count++
					if count > n {
						return &os.PathError{Op: op, Path: path, Err: syscall.EIO}
					}
					return nil
				})
				err := sc.run(t.Context(), s, w)
				dead := count > n
				if err == nil && !dead {
					break
				}
				for _, keep := range []float64{0, 0.5, 1} {
					s := open(t, mem.CrashClone(keep, newRand()), true)
					_, serr := s.Sweep(t.Context())
					must(t, serr)
					tidy(t, s)
					if err == nil {
						sc.check(t, s, w, afterReboot(sc.after))
					} else {
						sc.check(t, s, w, afterReboot(sc.before), afterReboot(sc.after))
					}
				}
				if t.Failed() {
					t.Fatalf("disk dead from operation %d on: got %v", n, err)
				}
			}
		})
	}
}

// TestOpenCrash: a store whose making was cut short is made again.
func TestOpenCrash(t *testing.T) {
	mem := fsys.NewMem()
	var crashes []*fsys.Mem
	_, err := Open(fsys.Hook(mem, func(op, path string) error {
		for _, keep := range []float64{0, 0.5, 1} {
			crashes = append(crashes, mem.CrashClone(keep, newRand()))
		}
		return nil
	}), where)
	must(t, err)
	crashes = append(crashes, mem.CrashClone(0, newRand()))
	for _, c := range crashes {
		s := open(t, c, true)
		id := mustCommit(t, s, alice, 0)
		s = open(t, c.CrashClone(0, newRand()), true)
		if got := states(t, s); got[id] != Committed {
			t.Fatalf("got %v", got)
		}
	}
	for n := int64(0); ; n++ {
		mem := fsys.NewMem()
		hook, reached := fsys.FailNth(n, syscall.EIO)
		_, err := Open(fsys.Hook(mem, hook), where)
		s := open(t, mem, false)
		mustCommit(t, s, alice, 0)
		if !reached() {
			must(t, err)
			break
		}
	}
}

// TestUnsafeCommitIsDisarmed: if the disk fails when a checkpoint is already
// visible and it cannot be taken back, then at least it can't be restored, for
// its container goes on.
func TestUnsafeCommitIsDisarmed(t *testing.T) {
	mem, w := begin(t, scenario{})
	s := open(t, mem, false)
	renamed := false
	s.fs = fsys.Hook(mem, func(op, path string) error {
		if op == "rename" && !renamed {
			renamed = true
			return nil
		}
		if renamed && (op == "rename" || op == "syncdir") {
			return syscall.EIO
		}
		return nil
	})
	m := *w.next
	err := commit(t.Context(), s, &m)
	wantIs(t, err, syscall.EIO)
	s.fs = mem
	var corrupt *CorruptError
	if _, err := s.Latest(t.Context(), alice); !errors.As(err, &corrupt) || corrupt.ID != w.next.ID {
		t.Errorf("latest: %v", err)
	}
	_, err = s.Claim(t.Context(), w.next.ID, "c")
	wantIs(t, err, checkpoint.ErrCorrupt)
}

// TestFailedCommitStaysAway: a commit that failed after its rename had become
// durable does not come back with the next crash.
func TestFailedCommitStaysAway(t *testing.T) {
	mem, w := begin(t, scenario{})
	s := open(t, mem, false)
	failed := false
	s.fs = fsys.Hook(mem, func(op, path string) error {
		if op == "syncdir" && path == s.path(committedDir, alice.Hash()) && !failed {
			failed = true
			return errors.Join(mem.SyncDir(path), syscall.EIO)
		}
		return nil
	})
	m := *w.next
	wantIs(t, commit(t.Context(), s, &m), syscall.EIO)
	s = open(t, mem.CrashClone(0, newRand()), true)
	if m, err := s.Latest(t.Context(), alice); err != nil || m.ID != w.newest {
		t.Errorf("latest: %v, %v", m, err)
	}
}

const childEnv = "STASIS_STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	if root := os.Getenv(childEnv); root != "" {
		fmt.Println("error", child(root))
		os.Exit(1)
	}
	_ = log.SetLevel("fatal") // thousands of crashes are no news here
	os.Exit(m.Run())
}

// child works on the store until it is killed. It tells what it did, one line
// each: "+ID" once committed, "-ID" before it may be removed.
func child(root string) error {
	s, err := Open(fsys.OS{}, root)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	ctx := context.Background()
	for n := 0; ; n++ {
		m := &checkpoint.Manifest{Identity: alice, CreatedAt: time.Now()}
		m.ID = checkpoint.NewID(alice, m.CreatedAt)
		if err := commit(ctx, s, m); err != nil {
			return err
		}
		fmt.Printf("+%s\n", m.ID)
		latest, err := s.Latest(ctx, alice)
		if err != nil {
			return err
		}
		if n%3 == 0 {
			fmt.Printf("-%s\n", latest.ID)
		}
		c, err := s.Claim(ctx, latest.ID, "c")
		if err != nil {
			return err
		}
		switch n % 3 {
		case 0:
			err = c.Consume(ctx)
		case 1:
			err = c.Release(ctx)
		case 2:
			err = c.Quarantine(ctx, "test", nil)
		}
		if err != nil {
			return err
		}
	}
}

// TestKill kills a process at work with SIGKILL, time and again on one store.
// In memory it is killed at any point, on disk mostly where it waits for a sync.
func TestKill(t *testing.T) {
	memory, err := os.MkdirTemp("/dev/shm", "stasis-test-")
	must(t, err)
	defer os.RemoveAll(memory)
	t.Run("memory", func(t *testing.T) { testKill(t, filepath.Join(memory, "store")) })
	t.Run("disk", func(t *testing.T) { testKill(t, filepath.Join(t.TempDir(), "store")) })
}

func testKill(t *testing.T, root string) {
	s, err := Open(fsys.OS{}, root)
	must(t, err)
	there, maybe := map[checkpoint.ID]bool{}, map[checkpoint.ID]bool{}
	released, stages := 0, 0
	for range 30 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+root)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var timer *time.Timer
		work := 1 + rand.IntN(6) // lines, so that a slow machine gets as far as a fast one
		for lines := bufio.NewScanner(out); lines.Scan(); {
			id := checkpoint.ID(lines.Text()[1:])
			if work--; work == 0 {
				timer = time.AfterFunc(time.Duration(rand.IntN(40_000))*time.Microsecond, func() { cmd.Process.Kill() })
			}
			switch lines.Text()[0] {
			case 'r': // ready
			case '+':
				there[id] = true
			case '-':
				maybe[id] = true
			default:
				t.Errorf("child: %s", lines.Text())
			}
		}
		_ = cmd.Wait() // killed
		if timer == nil || timer.Stop() {
			t.Error("child ended by itself")
		}

		r, err := s.Sweep(t.Context())
		must(t, err)
		released += len(r.Released)
		stages += r.Stages
		tidy(t, s)
		got := states(t, s)
		for id := range there {
			if got[id] == "" && !maybe[id] {
				t.Errorf("%s was committed and is lost", id)
			}
		}
		for id, state := range got {
			if state == Claimed {
				t.Errorf("%s is still claimed", id)
			}
		}
		if t.Failed() {
			t.FailNow()
		}
		// Keep it small, so that the look at all of it stays short.
		for id, state := range got {
			if state == Quarantined {
				must(t, s.Remove(t.Context(), id))
				maybe[id] = true
			}
		}
	}
	t.Logf("%d committed, %d stages swept, %d claims taken back", len(there), stages, released)
	if len(there) < 10 || stages+released == 0 {
		t.Error("no kill hit anything")
	}
}
